"""Reward functions in TRL's signature, both ways: TRL's in our steps, ours in TRL's trainers."""

import asyncio
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from edu.tasks.score import Grader, Score
from edu.tasks.task import Example

TaskReward = Callable[[Example, str], float]
TRLReward = Callable[..., Any]
MAX_REWARD = 1e6
"""Larger rewards are taken for a mistake: their differences are lost in float32."""
OF_THE_ROLLOUT = {"messages", "prompt", "completion", "completion_ids"}  # fields that TRL does not hand on as columns


def as_trl_reward(task_reward: TaskReward) -> Callable[..., list[float]]:
    """Give a task's reward to TRL, whose trainers call `f(prompts, completions, completion_ids, **columns) -> list[float]`.

    Each column is a list with one entry per completion (TRL's other arguments are not, and are left out).
    A completion is text, or a list of messages of which the last one's content is graded.

    >>> f = as_trl_reward(lambda example, completion: float(completion == example["answer"]))
    >>> f(prompts=["1+1", "1+2"], completions=["2", "2"], completion_ids=[[7], [7]], answer=["2", "3"])
    [1.0, 0.0]
    """

    def reward(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **columns: Any
    ) -> list[float]:
        n = len(completions)
        columns |= {"messages": prompts, "completion_ids": completion_ids}
        rows = {name: column for name, column in columns.items() if isinstance(column, list) and len(column) == n}
        texts = [each if isinstance(each, str) else str(each[-1]["content"]) for each in completions]
        return [task_reward({name: rows[name][i] for name in rows}, text) for i, text in enumerate(texts)]

    return reward


class TRLGrader:
    """Grade completions with a reward function written for TRL's GRPOTrainer, plain or async, by one call for all.

    It is called as TRL calls it: `prompts` and `completions` as messages, `completion_ids`, the examples' fields as columns,
    `trainer_state`, `log_extra` and `log_metric`. None ("does not apply") scores 0.0, as in TRL where no other function applies.
    """

    def __init__(self, trl_reward: TRLReward) -> None:
        self.trl_reward = trl_reward
        self.name = f"--reward {getattr(trl_reward, '__name__', type(trl_reward).__name__)}"
        self._runner: asyncio.Runner | None = None

    def at_step(self, step: int, max_steps: int) -> Grader:
        """Return the grader of a step, which the function sees as `trainer_state.global_step`."""
        from transformers import TrainerState

        state = TrainerState(global_step=step, max_steps=max_steps)
        return lambda examples, texts: self.grade(examples, texts, state)

    def grade(self, examples: Sequence[Example], texts: Sequence[str], trainer_state: object = None) -> list[Score]:
        """Score every completion; ValueError in one line if the function does not give one finite number for each."""
        columns, metrics = dict[str, list[Any]](), dict[str, list[float]]()
        fields = dict.fromkeys(name for example in examples for name in example if name not in OF_THE_ROLLOUT)
        found = self.trl_reward(
            prompts=[example["messages"] for example in examples],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[example.get("completion_ids") for example in examples],
            **{name: [example.get(name) for example in examples] for name in fields},
            trainer_state=trainer_state,
            log_extra=lambda column, values: columns.update({column: list(values)}),
            log_metric=lambda name, value: metrics.setdefault(name, []).append(float(value)),
        )
        rewards = self._numbers(self._result(found), texts)
        for name, values in columns.items():
            if len(values) != len(texts):
                raise ValueError(f"{self.name}: log_extra({name!r}) got {len(values)} values for {len(texts)} answers")
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        extra = [{name: values[i] for name, values in columns.items()} for i in range(len(texts))]
        return [Score(reward, logged, means) for reward, logged in zip(rewards, extra, strict=True)]

    def _result(self, found: Any) -> Any:
        """Await what an async function gave, on one event loop for all steps, since its clients belong to a loop."""
        if not inspect.isawaitable(found):
            return found
        if self._runner is None:
            self._runner = asyncio.Runner()
            weakref.finalize(self, self._runner.close)

        async def awaited() -> Any:
            return await found

        return self._runner.run(awaited())

    def _numbers(self, found: Any, texts: Sequence[str]) -> list[float]:
        """Read a list, array or tensor of numbers, bools or None."""
        found = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(found, str) or not hasattr(found, "__iter__"):
            raise ValueError(f"{self.name} gave {found!r:.80} in place of a list with a reward for each answer")
        values = [each.item() if hasattr(each, "item") else each for each in found]
        if len(values) != len(texts):
            raise ValueError(
                f"{self.name} gave {len(values)} rewards for {len(texts)} answers: it must give one for each"
            )
        for value, text in zip(values, texts, strict=True):
            if value is not None and not (isinstance(value, bool | int | float) and abs(value) <= MAX_REWARD):
                bounds = f"expected None or a number between -{MAX_REWARD:g} and {MAX_REWARD:g}"
                raise ValueError(f"{self.name} gave {str(value)[:40]!r} for the answer {text[:60]!r}: {bounds}")
        return [0.0 if value is None else float(value) for value in values]
