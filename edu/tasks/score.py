"""Score sampled completions: the one place where samples of the engine become text and a reward.

Rollouts and evaluation both call it, so training is graded exactly as it is measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edu.data.tokenizer import Tokenizer
from edu.tasks.task import Example, Task


class Completed(Protocol):
    """The part of the engine's `Sample` that scoring reads: the new tokens, stop token included, and why they ended."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def finish_reason(self) -> str: ...


def completion_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the completion as its reader sees it: up to its end token, without special tokens and without tool calls and outputs.

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


@dataclass(frozen=True)
class Score:
    """The reward of one sample, with what the reward function logged about it."""

    reward: float
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Extra columns of this sample for samples.jsonl."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scalars logged by the call that graded this sample."""


Grader = Callable[[Sequence[Example], Sequence[str]], list[Score]]
"""Scores completions together: one call with every finished sample of a step."""


def grade_one_by_one(task: Task) -> Grader:
    """Return a grader that asks the task for the reward of each completion alone."""
    return lambda examples, texts: [
        _checked(task.reward(e, text), text) for e, text in zip(examples, texts, strict=True)
    ]


def _checked(reward: Any, text: str) -> Score:
    """Refuse a task's reward that is no finite number."""
    if not isinstance(reward, bool | int | float) or not math.isfinite(reward):
        raise ValueError(f"the task's reward of the answer {text[:60]!r} is {reward!r:.40}: expected a finite number")
    return Score(float(reward))


def score_all(
    samples: Sequence[Completed], examples: Sequence[Example], grader: Grader, tokenizer: Tokenizer
) -> list[Score]:
    """Score samples, each with its example, by one call of the grader.

    Unfinished samples (cut by length, broken by a tool) score 0.0 and are never shown to the grader.
    """
    scores = [Score(0.0)] * len(samples)
    finished = [i for i, sample in enumerate(samples) if sample.finish_reason == "stop"]
    texts = [completion_text(samples[i].tokens, tokenizer) for i in finished]
    shown = [examples[i] | {"completion_ids": samples[i].tokens} for i in finished]
    for i, found in zip(finished, grader(shown, texts) if finished else [], strict=True):
        scores[i] = found
    return scores


def score(sample: Completed, example: Example, task: Task, tokenizer: Tokenizer) -> float:
    """Return the reward of one sample; unfinished ones score 0.0 whatever they say."""
    return score_all([sample], [example], grade_one_by_one(task), tokenizer)[0].reward
