"""Byte-level BPE: learned by edu.data.train_tokenizer, run by tiktoken, saved as the tokenizer.json that AutoTokenizer opens.

Ids of a vocabulary of V tokens:

    0 .. 255              the single bytes, in order
    256 .. 345            the numbers 10 .. 99: one token each, so that arithmetic copies numbers, not digits
    346 .. V - 11         what BPE learned from the text, most frequent merge first
    V - 10 .. V - 1       the special tokens, in the order of SPECIAL_TOKENS

An ordinary token's id is its rank: of all neighbors that can merge, those whose merged token has the lowest rank merge
first. That is tiktoken's rule; tokenizer.json lists every pair that makes a token, which is the same rule in Hugging
Face's words, and a test holds the two equal. Text never becomes a special token here: only `edu.chat.chat_format` places those.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken

from edu.data.atomic_io import write_text

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|pad|>",
)

# The split of GPT-4 (cl100k_base) with three changes. Numbers come in pairs of digits. The contractions spell out both
# cases: (?i:'s) also matches the long s, and engines differ on ligatures. Runs of white space end at 10,000 characters:
# the look-ahead is searched by backtracking, and a run of a million overflows tiktoken's stack, which ends the process.
PATTERN = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]"
    r"|\s{1,10000}(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """Text to ids and back. Make one with `edu.data.train_tokenizer` or `Tokenizer.load`.

    special: name -> id of the special tokens; each is an attribute too (`tokenizer.bos`, `tokenizer.user_start`, ...).
    vocab_size: all ids, special tokens included: the rows of the model's embedding.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str = PATTERN,
        model_max_length: int | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        """ranks: token bytes -> id, 0 .. n - 1; the special tokens take n .. n + 9. pattern: the split's regex.

        special_tokens: those, or all but the last: nanochat's vocabularies have no pad, and assistant_end pads.
        """
        assert tuple(special_tokens) in (SPECIAL_TOKENS, SPECIAL_TOKENS[:-1]), special_tokens
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.model_max_length = model_max_length
        self.special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.bos, self.user_start, self.user_end, self.assistant_start, self.assistant_end, *tool = (
            self.special.values()
        )
        self.python_start, self.python_end, self.output_start, self.output_end, *pad = tool
        (self.pad,) = pad or (self.assistant_end,)
        self.vocab_size = len(ranks) + len(self.special)
        ordinary = sorted(self.ranks, key=self.ranks.__getitem__)
        self._bytes = ordinary + [name.encode() for name in self.special]
        self._bpe = tiktoken.Encoding(
            "edu",
            pat_str=pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.special,
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text; special tokens typed in it stay text, lone surrogates become "?"."""
        return self._bpe.encode_ordinary(clean(text))

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Encode many texts: one read-only uint32 array a text, without a Python list between."""

        def encode(text: str) -> np.ndarray:
            try:
                return self._bpe.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:  # a lone surrogate; to look for one in every text would cost more
                return self._bpe.encode_to_numpy(clean(text), disallowed_special=())

        return [encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """Return the bytes of the ids; special tokens are written by name, or left out. ValueError on an id out of range."""
        first_special = self.bos
        parts = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size}")
            if token < first_special or not skip_special:
                parts.append(self._bytes[token])
        return b"".join(parts)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Return the text of the ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each id stands for, (V,) int64; 0 for special tokens. For bits per byte of raw text."""
        return np.array([len(token) for token in self._bytes[: self.bos]] + [0] * len(self.special), dtype=np.int64)

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each complete or not at all.

        model_max_length: the model's context in tokens, for transformers' warnings and truncation. Without it, the one
        that this tokenizer was loaded with. tokenizer.json comes last: a folder that has it has all three.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = tokenizer_config(self, model_max_length or self.model_max_length)
        write_text(folder / "chat_template.jinja", _shipped("chat_template.jinja"))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "tokenizer.json", hugging_face_json(self))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote, or transformers re-saved. ValueError if there is no such tokenizer in the folder."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            command = f"python scripts/train_tokenizer.py --out {folder}"
            raise ValueError(f"{folder}: no tokenizer.json in this folder; make a tokenizer with `{command}`")
        config_path = path.with_name("tokenizer_config.json")
        try:
            spec = json.loads(path.read_text("utf-8"))
            config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
            ranks, pattern, special = _read_spec(spec)
            names = tuple(sorted(special, key=special.__getitem__))
            ids = [*sorted(ranks.values()), *sorted(special.values())]
            length = config.get("model_max_length")
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a tokenizer of this project's form (byte-level BPE): {reason}") from error
        if names not in (SPECIAL_TOKENS, SPECIAL_TOKENS[:-1]) or ids != list(range(len(ids))):
            raise ValueError(f"{path}: expected ids 0, 1, 2, ... with {', '.join(SPECIAL_TOKENS)} last, in this order")
        return cls(ranks, pattern, length if isinstance(length, int) and length < 10**9 else None, names)


def clean(text: str) -> str:
    """Return the text that UTF-8 can hold: lone surrogates become "?".

    >>> clean("a" + chr(0xD800))
    'a?'
    """
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def byte_names() -> tuple[str, ...]:
    """Return the visible character by which tokenizer.json writes each byte: itself if printable, else 256 + a counter.

    The table is GPT-2's, which every byte-level tokenizer of the Hub uses.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def hugging_face_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as a tokenizer.json: same split, same ranks, BOS before every text that is not a rendered chat."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    name = {token: "".join(byte_names()[byte] for byte in token) for token in tokenizer.ranks}
    merges = [
        (name[token[:cut]], name[token[cut:]])
        for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in name and token[cut:] in name
    ]
    vocabulary = {name[token]: rank for token, rank in tokenizer.ranks.items()}
    # ignore_merges: a chunk that is a token is that token at once, as in tiktoken
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(special, normalized=False, special=True) for special in tokenizer.special])
    bos = SPECIAL_TOKENS[0]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos)]
    )
    return fast.to_str(pretty=True)


def tokenizer_config(tokenizer: Tokenizer, model_max_length: int | None) -> dict[str, Any]:
    """Return the tokenizer_config.json that transformers reads beside tokenizer.json.

    BOS is added to plain text (`tokenizer(text)`), since the model never saw a document without it; the chat template
    writes its own, and `add_special_tokens=False` leaves it out. Padding is on the left, as generation needs it.
    response_template is how `parse_response` (so `transformers serve`, TRL) reads an assistant's turn into a message.
    """
    name = {token: name for name, token in tokenizer.special.items()}
    bos, eos, pad = name[tokenizer.bos], name[tokenizer.assistant_end], name[tokenizer.pad]
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "add_bos_token": True,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "extra_special_tokens": [name for name in tokenizer.special if name not in (bos, eos, pad)],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "response_template": json.loads(_shipped("response_template.json")),
    }
    return config if model_max_length is None else config | {"model_max_length": model_max_length}


def _read_spec(spec: Mapping[str, Any]) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Return ranks, split pattern, special tokens of a parsed tokenizer.json; KeyError and the like on another form."""
    byte_of = {name: byte for byte, name in enumerate(byte_names())}
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocabulary: Mapping[str, int] = spec["model"]["vocab"]
    ranks = {
        bytes([byte_of[letter] for letter in name]): rank for name, rank in vocabulary.items() if name not in special
    }
    split: Sequence[Mapping[str, Any]] = spec["pre_tokenizer"]["pretokenizers"]
    return ranks, split[0]["pattern"]["Regex"], special


def _shipped(name: str) -> str:
    """Return the text of a file beside this module."""
    return Path(__file__).with_name(name).read_text("utf-8")
