"""Tasks: problems with a checkable answer. What a task is, what of a completion it sees, and TRL's reward signature both ways.

A task is any object with `len(task)`, `task.get_example(i)` and `task.reward(example, completion)`. An example is a dict:
`messages` (the conversation to complete), `answer` (the ground truth), and whatever else its source holds (kind, steps, ...).
The reward is a function of text alone. `score` is the one place where a sample of the engine becomes that text and a reward:
rollouts and evaluation both call it, so training is graded exactly as it is measured.
"""

import math
import pkgutil
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edu.data.tokenizer import Tokenizer

Example = dict[str, Any]
TaskReward = Callable[[Example, str], float]
TRLReward = Callable[..., list[float | None]]


class Task(Protocol):
    def __len__(self) -> int: ...

    def get_example(self, index: int) -> Example: ...

    def reward(self, example: Example, completion: str) -> float: ...


@dataclass(frozen=True)
class Subset:
    """Some examples of a task, in the order given."""

    task: Task
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def get_example(self, index: int) -> Example:
        return self.task.get_example(self.indices[index])

    def reward(self, example: Example, completion: str) -> float:
        return self.task.reward(example, completion)


@dataclass(frozen=True)
class Rewarded:
    """A task's examples under another reward, one in TRL's signature."""

    task: Task
    trl_reward: TRLReward

    def __len__(self) -> int:
        return len(self.task)

    def get_example(self, index: int) -> Example:
        return self.task.get_example(index)

    def reward(self, example: Example, completion: str) -> float:
        return from_trl_reward(self.trl_reward)(example, completion)


def load(place: str) -> Callable[..., Any]:
    """What the user wrote: a function or class by `file.py:name` or `package.module:name`. The file is run, as Python runs it.

    >>> load("fractions:Fraction")(1, 2)
    Fraction(1, 2)
    """
    path, _, name = place.rpartition(":")
    expected = "expected file.py:name or package.module:name"
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"{place}: no such file as {path}")
        found = runpy.run_path(path).get(name)
    else:
        try:
            found = pkgutil.resolve_name(place)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{place}: {error}; {expected}") from error
    if not callable(found):
        raise ValueError(f"{place}: no function or class of that name; {expected}")
    return found


class Completed(Protocol):
    """What `score` needs of the engine's `Sample`: the new tokens, stop token included, and why they ended."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def finish_reason(self) -> str: ...


def completion_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The completion as its reader sees it: up to its end token, without special tokens and without tool calls and outputs.

    A block that never closes hides all up to the next special token.
    """
    runs: list[list[int]] = [[]]
    hidden = False
    for token in tokens:
        if token == tokenizer.assistant_end:
            break
        if token >= tokenizer.bos:
            hidden = token in (tokenizer.python_start, tokenizer.output_start)
            runs.append([])
        elif not hidden:
            runs[-1].append(token)
    return "".join(tokenizer.decode(run) for run in runs)


def score(sample: Completed, example: Example, task: Task, tokenizer: Tokenizer) -> float:
    """Reward of one sample. Unfinished ones (cut by length, broken by a tool) score 0.0 whatever they say."""
    if sample.finish_reason != "stop":
        return 0.0
    return task.reward(example | {"completion_ids": sample.tokens}, completion_text(sample.tokens, tokenizer))


def as_trl_reward(task_reward: TaskReward) -> TRLReward:
    """Give a task's reward to TRL, whose trainers call `f(prompts, completions, completion_ids, **columns) -> list[float]`.

    Each column is a list with one entry per completion (TRL's other arguments are not, and are left out).
    A completion is text, or a list of messages of which the last one's content is graded.

    >>> f = as_trl_reward(lambda example, completion: float(completion == example["answer"]))
    >>> f(prompts=["1+1", "1+2"], completions=["2", "2"], completion_ids=[[7], [7]], answer=["2", "3"])
    [1.0, 0.0]
    """

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **columns: Any
    ) -> list[float | None]:
        n = len(completions)
        columns |= {"messages": prompts, "completion_ids": completion_ids}
        rows = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == n}
        texts = [each if isinstance(each, str) else str(each[-1]["content"]) for each in completions]
        return [task_reward({name: rows[name][i] for name in rows}, text) for i, text in enumerate(texts)]

    return reward


def from_trl_reward(trl_reward: TRLReward, *, conversational: bool = True) -> TaskReward:
    """Take a reward function written for TRL. It sees messages, as TRL passes them for a conversational data set, or else plain text.

    `completion_ids` holds the sampled ids where `score` knows them, else None. TRL's arguments for its own trainer are there and do
    nothing. A reward of None (TRL: "does not apply") or one that is not finite is a ValueError.

    >>> reward = from_trl_reward(lambda completions, answer, **rest: [float(c[0]["content"] == a) for c, a in zip(completions, answer)])
    >>> reward({"messages": [{"role": "user", "content": "1+1"}], "answer": "2"}, "2")
    1.0
    """

    def reward(example: Example, completion: str) -> float:
        columns = {name: [value] for name, value in example.items() if name not in {"messages", "completion_ids"}}
        prompt = example["messages"] if conversational else example["messages"][-1]["content"]
        message = [{"role": "assistant", "content": completion}] if conversational else completion
        ids = [example.get("completion_ids")]
        columns |= {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        (value,) = trl_reward(prompts=[prompt], completions=[message], completion_ids=ids, **columns)
        if value is None or not math.isfinite(value):
            raise ValueError(f"the reward function gave {value} for {completion[:80]!r}: every sample needs a number")
        return float(value)

    return reward


def _ignore(*_: object) -> None:
    """Stands for TRL's logging."""
