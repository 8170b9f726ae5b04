"""A checkpoint of nanochat as a folder of ours: the same model, its logits unchanged.

nanochat writes model_000650.pt and meta_000650.json, and once for all its models tokenizer.pkl. Up to December 2025 its
mathematics is that of transformers' `nanochat`: the tensors get other names, and that is all. What came later (value
embeddings, residual scales, windows, smear, backout) has no place there and is refused by name.

Nothing in the files is executed. The weights are read by torch with weights_only=True; tokenizer.pkl by `read_encoding`.
"""

import pickletools
import re
import shutil
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from edu.config.cli import checked
from edu.config.reading import read_json
from edu.config.stages import Count
from edu.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from edu.hub.push import Card, write_card
from edu.model.config import GPTConfig
from edu.model.gpt import GPT
from edu.training.checkpoint import follow_umask

NAMES = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SETTINGS = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}
TOO_NEW = (
    "a newer nanochat, which transformers' `nanochat` does not compute: checkpoints up to December 2025 can be read"
)


def import_nanochat(folder: Path, out: Path, step: int | None = None, tokenizer: Path | None = None) -> Path:
    """Write the folder `out` from the checkpoint of a step, by default the last; ValueError says what is wrong.

    tokenizer: tokenizer.pkl, or its folder; by default beside the weights, or where nanochat keeps it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty; give a new folder")
    weights = find_weights(folder, step)
    tensors = read_tensors(weights)
    config = read_config(weights.with_name(weights.name.replace("model_", "meta_")).with_suffix(".json"))
    vocabulary = read_tokenizer(find_tokenizer(folder, tokenizer))
    if vocabulary.vocab_size != config.vocab_size:
        raise ValueError(
            f"{weights}: a model of {config.vocab_size} tokens, a tokenizer of {vocabulary.vocab_size}: "
            "they are not of one run; name the right one with --tokenizer"
        )
    config.bos_token_id, config.eos_token_id = vocabulary.bos, vocabulary.assistant_end
    config.pad_token_id = vocabulary.pad
    with torch.device("meta"):
        model = GPT(config)
    for name in NAMES.values():  # nanochat may pad the vocabulary for speed, and leaves those logits out
        if name in tensors:
            tensors[name] = tensors[name][: config.vocab_size]
    wanted, found = ({name: list(x.shape) for name, x in state.items()} for state in (model.state_dict(), tensors))
    if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        shapes = "; ".join(f"{name} is {found.get(name)}, expected {wanted.get(name)}" for name in wrong[:3])
        raise ValueError(f"{weights}: {len(wrong)} tensors are not of the sizes that meta tells: {shapes}")
    model.load_state_dict(tensors, assign=True)
    model.generation_config.eos_token_id = [vocabulary.assistant_end, vocabulary.bos]  # nanochat stops at either
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    vocabulary.save(temporary, model_max_length=config.max_position_embeddings)
    follow_umask(temporary)
    step = int(weights.stem.removeprefix("model_"))
    write_card(
        temporary, Card("imported", step, data=[(f"nanochat {folder.resolve().name}", "as it was trained there")])
    )
    if out.exists():
        out.rmdir()
    return temporary.rename(out)


def find_weights(folder: Path, step: int | None) -> Path:
    """Find the weights of a step, or of the last one; ValueError if the folder has none."""
    found = {int(path.stem.removeprefix("model_")): path for path in folder.glob("model_" + "[0-9]" * 6 + ".pt")}
    if not found:
        raise ValueError(f"--checkpoint {folder}: no model_*.pt here; give nanochat's folder of one model")
    if step is not None and step not in found:
        raise ValueError(f"--step {step}: {folder} has steps {', '.join(map(str, sorted(found)))}")
    return found[max(found) if step is None else step]


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """Find tokenizer.pkl as given, or beside the weights, or where nanochat keeps the one of all its models."""
    here = folder.resolve()
    places = [here, here.parent.parent / "tokenizer"] if given is None else [given]
    paths = [place / "tokenizer.pkl" if place.is_dir() else place for place in places]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"no tokenizer at {' or '.join(map(str, paths))}; name nanochat's tokenizer.pkl with --tokenizer")


def read_config(path: Path) -> GPTConfig:
    """Read the sizes in a meta_*.json."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it has the sizes of the model, and stands beside the weights")
    try:
        meta = read_json(path)["model_config"]
        sizes = {ours: checked(name, Count, meta[name]) for name, ours in SETTINGS.items()}
    except (ValueError, TypeError, LookupError) as error:
        wanted = ", ".join(SETTINGS)
        raise ValueError(f"{path}: expected `model_config` with {wanted} ({type(error).__name__}: {error})") from None
    if others := sorted(set(meta) - set(SETTINGS)):
        raise ValueError(f"{path}: {', '.join(others)} in `model_config`: of {TOO_NEW}")
    try:
        return GPTConfig(
            **sizes,
            intermediate_size=4 * sizes["hidden_size"],
            rms_norm_eps=torch.finfo(torch.float32).eps,  # what F.rms_norm adds when it is told nothing
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a model_*.pt under our names, in the widest of their types; ValueError names those of no place here."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not weights that torch reads without running code: {reason}") from None
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise ValueError(f"{path}: expected a dict of tensors")
    tensors = {
        str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()
    }  # torch.compile's prefix
    if unknown := {re.sub(r"\.\d+\.", ".N.", name) for name in tensors if our_name(name) is None}:
        raise ValueError(f"{path}: tensors {', '.join(sorted(unknown))}: of {TOO_NEW}")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {str(our_name(name)): tensor.to(dtype) for name, tensor in tensors.items()}


def our_name(name: str) -> str | None:
    """Return a tensor's name in transformers, None for one that is not of this architecture.

    >>> our_name("transformer.h.3.attn.c_q.weight"), our_name("value_embeds.1.weight")
    ('model.layers.3.self_attn.q_proj.weight', None)
    """
    if match := re.fullmatch(r"transformer\.h\.(\d+)\.(\w+\.\w+)\.weight", name):
        ours = LAYER_NAMES.get(match[2])
        return ours and f"model.layers.{match[1]}.{ours}.weight"
    return NAMES.get(name)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read nanochat's tokenizer.pkl: same ids for every text. It has no pad token, so the end of a turn pads."""
    try:
        state = read_encoding(path.read_bytes())
        ranks, special, pattern = state["mergeable_ranks"], state["special_tokens"], state["pat_str"]
        good = isinstance(pattern, str) and all(isinstance(token, bytes) for token in ranks)
        good = good and sorted(ranks.values()) == list(range(len(ranks)))
        if not good or special != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS[:-1])}:
            raise ValueError(f"expected ids 0, 1, 2, ... with {', '.join(SPECIAL_TOKENS[:-1])} last, in this order")
        # White space in bounds, as in our own pattern: unbounded, tiktoken's stack overflows on a million spaces.
        return Tokenizer(ranks, pattern.replace(r"|\s+(?!\S)", r"|\s{1,10000}(?!\S)"), special_tokens=tuple(special))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not the tokenizer that nanochat saves: {reason}") from None


def read_encoding(data: bytes) -> dict[str, Any]:
    """Return the state of a pickled tiktoken.Encoding, without unpickling: name, pat_str, mergeable_ranks, special_tokens.

    A pickle is a program for a stack machine. Its few instructions that only build dicts of text, bytes and numbers are
    carried out here; the one class it may name is noted as a word and never looked up. Any other instruction ends it.

    >>> import pickle
    >>> read_encoding(pickle.dumps(print))
    Traceback (most recent call last):
    ValueError: it names builtins.print, and only tiktoken.core.Encoding is expected
    """
    mark, encoding = object(), object()
    stack, memo = list[Any](), dict[Any, Any]()
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES" | "BININT1" | "BININT2" | "BININT":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(mark)
            case "SETITEM" | "SETITEMS":
                start = len(stack) - (2 if opcode.name == "SETITEM" else stack[::-1].index(mark))
                items = stack[start:]
                del stack[start - (opcode.name == "SETITEMS") :]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "STACK_GLOBAL":
                name = ".".join(map(str, stack[-2:]))
                if name != "tiktoken.core.Encoding":
                    raise ValueError(f"it names {name}, and only tiktoken.core.Encoding is expected")
                stack[-2:] = [encoding]
            case "NEWOBJ" if stack == [encoding, ()]:  # an Encoding without arguments, which BUILD then gives its state
                stack.pop()
            case "BUILD" if stack[:-1] == [encoding] and isinstance(stack[-1], dict):
                return stack[-1]
            case other:
                raise ValueError(f"instruction {other} is not one by which a tiktoken.Encoding is saved here")
    raise ValueError("it ends before the encoding's state")
