"""Mixtures of conversations for SFT: files and data sets of the Hub, in the forms that people have, counted by what became of them.

A mixture file lists the sources:

    - path: data/my_identity.jsonl        # {"messages": [...]} a line
      weight: 2                           # each conversation twice an epoch (0.5: every second one)
    - path: data/tiny/problems/sft.jsonl  # {"question", "answer"}: GSM8K's form, calls of the calculator included
    - hub: HuggingFaceTB/smol-smoltalk    # a data set of the Hub, with `config` and `split`

What cannot be used is counted by reason and said; a source with nothing usable is an error. A row that is no
conversation is an error where the file is one's own to mend, and counted where the data set is the Hub's.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field

from edu.chat.chat_format import TRAIN_FLAGS, ConversationError, Message, render, tool_call, trains
from edu.chat.sft_data import training_example
from edu.config.fields import checked
from edu.config.reading import read_yaml
from edu.data.packing import TrainingExample
from edu.data.rows import Row, hub_rows, read_rows, text_field
from edu.data.tokenizer import Tokenizer

_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")


@dataclass(frozen=True)
class MixtureSource:
    """One source of conversations, by `path` (jsonl or parquet file) or by `hub` (data set id)."""

    path: Path | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    weight: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """Times that each conversation is seen in an epoch. Those held out count once, so that their loss stays comparable."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def name(self) -> str:
        """The path or the data set's id."""
        return str(self.path or self.hub)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each with its place for messages."""
        if self.path is None:
            assert self.hub is not None
            return hub_rows(self.hub, self.config, self.split)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; ./my_pipeline.sh makes the default ones")
        return read_rows(self.path)


@dataclass(frozen=True)
class SFTData:
    """Conversations, rendered and ready for packing."""

    train: list[TrainingExample]
    """Repeated by weight."""
    val: list[TrainingExample]
    """Held out: never in train."""
    report: dict[str, Counter[str]]
    """Per source: how many are "used", and how many are not, by reason."""

    def counts(self) -> dict[str, str]:
        """Return the report in words, by source."""
        return {name: ", ".join(f"{n:,} {why}" for why, n in counts.items()) for name, counts in self.report.items()}

    def describe(self) -> str:
        """Return the report in words, a line a source."""
        return "\n".join(f"{name}: {words}" for name, words in self.counts().items())


def read_mixture(path: Path) -> list[MixtureSource]:
    """Return the sources of a mixture file, or the one file of conversations that `path` is."""
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file")
    if path.suffix not in (".yaml", ".yml"):
        return [MixtureSource(path=path)]
    sources = []
    entries = read_yaml(path) or []
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            source = checked("source", MixtureSource, entry)
            if (source.path is None) == (source.hub is None):
                raise ValueError
        except ValueError:
            form = "give either path or hub, and config, split, a positive weight"
            raise ValueError(f"{path}, source {i}: {form}; found {str(entry)[:200]}") from None
        sources.append(source)
    if not sources:
        raise ValueError(f"{path}: no sources")
    return sources


def load_sft_data(path: Path, tokenizer: Tokenizer, sequence_length: int, val_every: int = 20) -> SFTData:
    """Read, check, render and divide the conversations of a mixture.

    1. Render each, up to its last answer; leave out, and count, those flagged not to be trained, those longer than a
       row and those in which nothing is trained.
    2. Hold out one in `val_every` by a checksum of its tokens, the same ones in every mixture.
    3. Repeat the others by their source's weight.
    """
    train, val, report = list[TrainingExample](), list[TrainingExample](), dict[str, Counter[str]]()
    for source in read_mixture(path):
        counts = report.setdefault(source.name, Counter())
        owed = 0.0
        for place, row in source.rows():
            # 1. One conversation, or the reason why it is none.
            example = rendered = None
            try:
                flag = next((name for name in TRAIN_FLAGS if trains(row, name) is False), None)
                if flag is None:
                    rendered = render(messages_of(row), tokenizer)
                    example = training_example(rendered, tokenizer)
                reason = f"flagged by {flag} {row[flag]!r}" if flag else unusable(example, sequence_length)
            except ConversationError as error:
                if source.path is not None:
                    raise ValueError(f"{place}: {error}") from error
                reason = "no conversation in order"
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            counts[reason or "used"] += 1
            if reason or example is None or rendered is None:
                continue
            if len(example.ids) < len(rendered.ids):
                counts["of these cut after the last answer"] += 1
            ids = np.asarray(example.ids)
            # 2. Held out, or 3. trained on, as often as its weight says.
            if zlib.crc32(ids.tobytes()) % val_every == 0:
                val.append(example)
                continue
            owed += source.weight
            train.extend([example] * int(owed))
            owed -= int(owed)
        if not counts["used"]:
            raise ValueError(f"{source.name}: no conversation can be used ({dict(counts)})")
    if not train:
        raise ValueError(f"--data {path}: nothing left to train on after holding out one conversation in {val_every}")
    return SFTData(train, val, report)


def unusable(example: TrainingExample | None, sequence_length: int) -> str | None:
    """Return the reason why a conversation cannot be trained on, None if it can."""
    if example is None:
        return "nothing that the assistant said"
    if len(example.ids) > sequence_length + 1:
        return f"longer than {sequence_length} tokens"
    return None if any(example.mask) else "nothing that is to be trained"


def messages_of(row: dict[str, Any]) -> Any:
    """Return the messages of a row in one of the three forms, unchecked; ValueError shows how to convert another.

    Only the completion of a prompt is trained, as in TRL: what the assistant said within the prompt has weight 0.
    """
    filled = {name: value for name, value in row.items() if value is not None}
    if "messages" in filled:
        return filled["messages"]
    if "prompt" in filled and "completion" in filled:
        prompt, completion = filled["prompt"], filled["completion"]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not isinstance(asked, list) or not isinstance(said, list):
            raise ValueError("prompt and completion: expected text, or lists of messages")
        return [*map(_only_read, asked), *said]
    if "question" in filled and "answer" in filled:
        return conversation(text_field(row, "question", "it"), text_field(row, "answer", "it"))
    form = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    line = conversion(filled)
    proposal = f"; convert each row, for instance: row = {line}" if line else "; convert each row to one of these"
    raise ValueError(
        f"fields {sorted(row)}; expected {form}, or prompt and completion, or question and answer{proposal}"
    )


def _only_read(message: Any) -> Any:
    said = isinstance(message, dict) and message.get("role") == "assistant"
    return {**message, "weight": 0} if said else message


def conversation(question: str, answer: str) -> list[dict[str, Any]]:
    """Return a solved problem of GSM8K's form as messages: each `<<48/2=24>>` becomes a tool call and its output.

    >>> [m["role"] for m in conversation("Half of 48?", "48/2=<<48/2=24>>24\\n#### 24")]
    ['user', 'assistant', 'tool', 'assistant']
    """
    text, *rest = _ANNOTATION.split(answer)  # text, then (expression, result, text) for each annotation
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    for expression, result, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        messages[-1] = tool_call(messages[-1]["content"], expression)
        messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": text}]
    return messages


# Forms of other data sets, for the conversion that an error proposes. A form that is not among them gets no proposal.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
ASKED = ("instruction", "question", "query", "prompt", "problem", "input")
SAID = ("output", "response", "answer", "completion", "solution", "target")
CONTEXT = ("input", "context")


def conversion(row: dict[str, Any]) -> str | None:
    """Return a line of Python that makes a conversation of such a row, or None where the form is not known for sure.

    >>> conversion({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    '{"messages": [{**m, "role": {"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]]}'
    >>> conversion({"instruction": "Say hi.", "output": "Hi."})
    '{"prompt": row["instruction"], "completion": row["output"]}'
    >>> conversion({"text": "Hi. Hello."})
    """
    if "chosen" in row or "rejected" in row:
        return _of_preference(row.get("prompt"), row.get("chosen"))
    if any(row.get(name) for name in ("system", "history", "tools")):
        return None
    lists = [name for name, value in row.items() if isinstance(value, list) and _turns(value)]
    if len(lists) == 1:
        return _of_turns(lists[0], row[lists[0]])
    said = [name for name in SAID if isinstance(row.get(name), str) and row[name]]
    asked, *others = [name for name in ASKED if isinstance(row.get(name), str)] or [""]
    context = [name for name in CONTEXT if name in row and name != asked]
    if lists or len(said) != 1 or not asked or not {*others} <= {*context}:
        return None
    prompt = f'row["{asked}"]'
    if context:
        given = ", ".join(f'row["{name}"]' for name in (asked, *context))
        prompt = f'"\\n\\n".join(filter(None, [{given}]))'
    return f'{{"prompt": {prompt}, "completion": row["{said[0]}"]}}'


def _of_preference(prompt: Any, chosen: Any) -> str | None:
    """The answer that was preferred: a text, the messages after a prompt, or the whole conversation."""
    if isinstance(chosen, list) and _turns(chosen) == ("role", "content") and chosen[0]["role"] in ("system", "user"):
        return '{"messages": row["chosen"]}'
    conversational = isinstance(prompt, list) and isinstance(chosen, list)
    plain = isinstance(prompt, str) and isinstance(chosen, str)
    return '{"prompt": row["prompt"], "completion": row["chosen"]}' if plain or conversational else None


def _of_turns(name: str, turns: list[Message]) -> str:
    role, content = _turns(turns) or ("role", "content")
    names = ", ".join(
        f'"{given}": "{ROLES[given]}"' for given in dict.fromkeys(m[role] for m in turns) if given in ROLES
    )
    who = f'{{{names}}}.get(m["{role}"], m["{role}"])' if names else f'm["{role}"]'
    plain = (role, content) == ("role", "content") and not names
    made = f'[{{**m, "role": {who}, "content": m["{content}"]}} for m in row["{name}"]]'
    return f'{{"messages": row["{name}"]}}' if plain else f'{{"messages": {made}}}'


def _turns(value: list[Any]) -> tuple[str, str] | None:
    """Return how the turns of a list name who speaks and what, None if these are no turns of known roles."""
    for role, content in (("from", "value"), ("role", "content")):
        known = {*ROLES, "system", "user", "assistant"}
        if value and all(
            isinstance(m, dict) and m.get(role) in known and isinstance(m.get(content), str) for m in value
        ):
            return role, content
    return None
