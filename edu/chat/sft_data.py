"""Conversations for SFT: read from any source, rendered, packed whole into rows, in an order that the seed fixes.

A mixture file lists the sources:

    - path: data/my_identity.jsonl        # {"messages": [...]} a line
      weight: 2                           # each conversation twice an epoch (0.5: every second one)
    - path: data/tiny/problems/sft.jsonl  # {"question", "answer"}: GSM8K's form, calls of the calculator included
    - hub: HuggingFaceTB/smol-smoltalk    # a data set of the Hub, with `config` and `split`

What cannot be used is counted by reason and said; a source with nothing usable is an error. A row that is no
conversation is an error where the file is one's own to mend, and counted where the data set is the Hub's.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edu.chat.chat_format import Rendered, render
from edu.config.reading import read_yaml
from edu.data.packing import Batch, TrainingExample, collate, pack_rows
from edu.data.rows import hub_rows, read_rows, text_field
from edu.data.tokenizer import Tokenizer

_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
TURNS = (("from", "value"), ("role", "content"))  # how a turn names who speaks and what


@dataclass(frozen=True)
class Source:
    """One source of conversations, by `path` (jsonl or parquet file) or by `hub` (data set id)."""

    path: Path | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    weight: float = 1.0
    """How often each conversation is seen in an epoch. Those held out count once, so that their loss stays comparable."""

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path or self.hub)


@dataclass(frozen=True)
class SFTData:
    """Conversations as pieces for packing."""

    train: list[TrainingExample]
    """Repeated by weight."""
    val: list[TrainingExample]
    """Held out: never in train."""
    report: dict[str, Counter[str]]
    """Per source: how many are "used", and how many are not, by reason."""

    def counts(self) -> dict[str, str]:
        """The report in words, by source."""
        return {name: ", ".join(f"{n:,} {why}" for why, n in counts.items()) for name, counts in self.report.items()}

    def describe(self) -> str:
        """The report in words, a line a source."""
        return "\n".join(f"{name}: {words}" for name, words in self.counts().items())


def read_mixture(path: Path) -> list[Source]:
    """The sources of a mixture file, or the one file of conversations that `path` is."""
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file")
    if path.suffix not in (".yaml", ".yml"):
        return [Source(path=path)]
    sources = []
    entries = read_yaml(path) or []
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            source = Source(**(entry | {"path": Path(entry["path"])} if entry.get("path") else entry))
            texts = [text for text in (source.hub, source.config) if text is not None]
            is_text = all(isinstance(text, str) for text in (*texts, source.split))
            if (source.path is None) == (source.hub is None) or not is_text or not 0 < source.weight < math.inf:
                raise TypeError
        except (AttributeError, TypeError):
            form = "give either path or hub, and config, split, a positive weight"
            raise ValueError(f"{path}, source {i}: {form}; found {str(entry)[:200]}") from None
        sources.append(source)
    if not sources:
        raise ValueError(f"{path}: no sources")
    return sources


def read_source(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source, each with its place for messages."""
    if source.path is not None:
        if not source.path.is_file():
            raise ValueError(f"{source.path}: no such file; ./my_pipeline.sh makes the default ones")
        yield from read_rows(source.path)
        return
    assert source.hub is not None
    yield from hub_rows(source.hub, source.config, source.split)


def messages_of(row: dict[str, Any], place: str) -> list[Any]:
    """The messages of a row in one of the three forms, their order unchecked; ValueError shows how to convert another."""
    if "messages" in row:
        return row["messages"]
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(asked, list) or not isinstance(said, list):
            raise ValueError("prompt and completion: expected text, or lists of messages")
        return [*asked, *said]
    if "question" in row and "answer" in row:
        question, answer = (text_field(row, name, place) for name in ("question", "answer"))
        return conversation(question, answer)
    form = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    raise ValueError(
        f"{place}: fields {sorted(row)}; expected {form}, or prompt and completion, or question and answer; "
        f"convert each row, for instance (with your own names): row = {conversion(row)}"
    )


def conversation(question: str, answer: str) -> list[dict[str, Any]]:
    """Turn a solved problem of GSM8K's form into messages: each `<<48/2=24>>` becomes a tool call and its output, all other text stays as it is.

    >>> [m["role"] for m in conversation("Half of 48?", "48/2=<<48/2=24>>24\\n#### 24")]
    ['user', 'assistant', 'tool', 'assistant']
    """
    text, *rest = _ANNOTATION.split(answer)  # text, then (expression, result, text) for each annotation
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    for expression, result, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
        messages[-1]["tool_calls"] = [call]
        messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": text}]
    return messages


def conversion(row: dict[str, Any]) -> str:
    """A line of Python that makes a conversation of a row of another form, by the row's own names as far as can be guessed.

    >>> conversion({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    '{"messages": [{"role": {"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]}'
    >>> conversion({"instruction": "Say hi.", "output": "Hi."})
    '{"prompt": row["instruction"], "completion": row["output"]}'
    """
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            role, content = next((pair for pair in TURNS if value[0].keys() >= {*pair}), TURNS[0])
            known = '{"human": "user", "gpt": "assistant"}'
            return (
                f'{{"messages": [{{"role": {known}.get(m["{role}"], m["{role}"]), "content": m["{content}"]}} '
                f'for m in row["{name}"]]}}'
            )
    names = [name for name, value in row.items() if isinstance(value, str) and value]
    asked, said = (names[0], names[-1]) if len(names) > 1 else ("QUESTION", "ANSWER")
    return f'{{"prompt": row["{asked}"], "completion": row["{said}"]}}'


def load_sft_data(path: Path, tokenizer: Tokenizer, sequence_length: int, val_every: int = 20) -> SFTData:
    """Read, check, render and divide the conversations of a mixture.

    1. Render each; leave out, and count, those longer than a row and those in which nothing is trained.
    2. Hold out one in `val_every` by a checksum of its tokens, the same ones in every mixture.
    3. Repeat the others by their source's weight.
    """
    train, val, report = list[TrainingExample](), list[TrainingExample](), dict[str, Counter[str]]()
    for source in read_mixture(path):
        counts = report.setdefault(source.name, Counter())
        owed = 0.0
        for place, row in read_source(source):
            try:
                messages = messages_of(row, place)
                rendered = render(messages, tokenizer)
            except ValueError as error:
                if source.hub and str(error).startswith(("message ", "an empty conversation")):
                    counts["no conversation in order"] += 1
                    continue
                raise ValueError(str(error) if str(error).startswith(place) else f"{place}: {error}") from error
            reason = unusable(rendered, sequence_length)
            counts[reason or "used"] += 1
            if reason:
                continue
            ids = np.array(rendered.ids, np.int32)
            piece = TrainingExample(ids, np.array(rendered.mask, np.int8))
            if zlib.crc32(ids.tobytes()) % val_every == 0:
                val.append(piece)
                continue
            owed += source.weight
            train.extend([piece] * int(owed))
            owed -= int(owed)
        if not counts["used"]:
            raise ValueError(f"{source.name}: no conversation can be used ({dict(counts)})")
    if not train:
        raise ValueError(f"--data {path}: nothing left to train on after holding out one conversation in {val_every}")
    return SFTData(train, val, report)


def unusable(rendered: Rendered, sequence_length: int) -> str | None:
    """Why a conversation cannot be trained on, if so."""
    if len(rendered.ids) > sequence_length + 1:
        return f"longer than {sequence_length} tokens"
    return None if any(rendered.mask) else "nothing that the assistant said"


def in_turns(
    pieces: Sequence[TrainingExample], share: float, sequence_length: int, rng: np.random.Generator
) -> list[TrainingExample]:
    """The conversations, a share of them as further turns of the one before, where they fit into a row."""
    talks = list[TrainingExample]()
    for piece in pieces:
        if talks and rng.random() < share and len(talks[-1].ids) + len(piece.ids) <= sequence_length + 2:
            ids, mask = (np.append(getattr(talks[-1], name), getattr(piece, name)[1:]) for name in ("ids", "mask"))
            talks[-1] = TrainingExample(ids, mask)  # without its BOS
        else:
            talks.append(piece)
    return talks


@dataclass
class Epochs:
    """Endless rows of pieces: every epoch all of them once, packed and shuffled anew from the seed.

    Rows of step s are the rows s * n .. (s + 1) * n - 1 of the endless sequence, so the step alone says where it stands.
    """

    pieces: Sequence[TrainingExample]
    sequence_length: int
    seed: int = 0
    multi_turn: float = 0.0
    """Share of the conversations that become further turns of another one."""

    def __post_init__(self) -> None:
        self._packed: list[tuple[int, list[list[TrainingExample]]]] = []  # (first row, rows) of each epoch so far

    def rows(self, first: int, count: int) -> list[list[TrainingExample]]:
        """Rows first .. first + count - 1."""
        return [self._row(first + i) for i in range(count)]

    def _row(self, index: int) -> list[TrainingExample]:
        while not self._packed or index >= self._packed[-1][0] + len(self._packed[-1][1]):
            epoch = len(self._packed)
            start = self._packed[-1][0] + len(self._packed[-1][1]) if epoch else 0
            rng = np.random.default_rng((self.seed, epoch))
            pieces = [self.pieces[i] for i in rng.permutation(len(self.pieces))]
            pieces = in_turns(pieces, self.multi_turn, self.sequence_length, rng)
            rows = pack_rows(pieces, self.sequence_length)
            self._packed.append((start, [[pieces[i] for i in rows[r]] for r in rng.permutation(len(rows))]))
        start, rows = next(epoch for epoch in reversed(self._packed) if epoch[0] <= index)
        return rows[index - start]


def batches_of(micro: Sequence[Sequence[Sequence[TrainingExample]]], sequence_length: int, pad: int) -> list[Batch]:
    """Micro-batches of rows as Batches; an empty one becomes one row with nothing to learn."""
    return [collate(rows or [[]], sequence_length, pad) for rows in micro]
