"""Rollouts: sample K answers to a problem, score each, and turn what was sampled into rows to learn from.

A rollout trains exactly the tokens that the model chose, the stop token included; the prompt and what a tool forced are
only read. Its weight is its advantage: how much better it scored than the mean of its group (GRPO, arXiv:2402.03300,
without the division by the standard deviation: Dr. GRPO, arXiv:2503.20783).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np

from edu import metrics
from edu.chat import calculator_tool, render_prompt
from edu.engine import Engine, Sample
from edu.packing import Piece
from edu.tasks import Example, Subset, Task, score
from edu.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One answer to one problem."""

    prompt: list[int]
    sample: Sample
    reward: float
    advantage: float
    """Reward minus the mean reward of the group."""

    @property
    def piece(self) -> Piece:
        """What is trained: the sampled tokens, weighted by the advantage."""
        mask = [0] * len(self.prompt) + self.sample.mask
        return Piece(self.prompt + self.sample.tokens, mask, self.advantage)


def fitting(task: Task, tokenizer: Tokenizer, room: int) -> tuple[Task, int]:
    """The problems whose prompt has at most `room` tokens, and how many do not; ValueError if none is left."""
    lengths = [len(render_prompt(task.get_example(i)["messages"], tokenizer)) for i in range(len(task))]
    kept = [i for i, length in enumerate(lengths) if length <= room]
    if not kept:
        raise ValueError(
            f"no problem leaves room for an answer: the shortest has {min(lengths)} tokens, {room} are free"
        )
    return Subset(task, kept), len(lengths) - len(kept)


def advantages(rewards: Sequence[float]) -> list[float]:
    """Reward minus the group's mean; zero for all where the rewards are equal.

    >>> advantages([1.0, 0.0, 0.0, 0.0])
    [0.75, -0.25, -0.25, -0.25]
    """
    mean = fmean(rewards)
    return [reward - mean for reward in rewards]


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    seeds: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
) -> list[list[Rollout]]:
    """K rollouts of each problem, at full softmax: log-probabilities trained are those sampled from."""
    prompts = [render_prompt(example["messages"], tokenizer) for example in examples]
    groups = engine.generate(
        prompts,
        num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_tokens=[tokenizer.assistant_end],
        seed=seeds,
        tool=calculator_tool(tokenizer),
    )
    rollouts = []
    for prompt, example, group in zip(prompts, examples, groups, strict=True):
        rewards = [score(sample, example, task, tokenizer) for sample in group]
        rated = zip(group, rewards, advantages(rewards), strict=True)
        rollouts.append([Rollout(prompt, sample, reward, advantage) for sample, reward, advantage in rated])
    return rollouts


def summarise(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """The figures of a step's rollouts, under TRL's names."""
    flat = [rollout for group in groups for rollout in group]
    spreads = [pstdev(rollout.reward for rollout in group) for group in groups]
    chosen = [p for r in flat for p, m in zip(r.sample.logprobs, r.sample.mask, strict=True) if m]
    return {
        metrics.REWARD: fmean(rollout.reward for rollout in flat),
        metrics.REWARD_STD: fmean(spreads),
        metrics.ZERO_STD: fmean(spread == 0 for spread in spreads),
        metrics.MEAN_LENGTH: fmean(len(rollout.sample.tokens) for rollout in flat),
        metrics.CLIPPED_RATIO: fmean(rollout.sample.finish_reason == "length" for rollout in flat),
        # -log p of what was sampled is an unbiased estimate of the entropy where it was sampled.
        metrics.ENTROPY: -fmean(chosen),
    }


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, independent of those of all other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of 0 .. count - 1 in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def draw(count: int, seed: int, first: int, number: int) -> list[int]:
    """Entries first .. first + number - 1 of the endless sequence of shuffled epochs, so that a step alone says its own.

    >>> draw(4, 0, 0, 8) == shuffled(4, 0, 0) + shuffled(4, 0, 1)
    True
    """
    epochs = {epoch: shuffled(count, seed, epoch) for epoch in range(first // count, (first + number - 1) // count + 1)}
    return [epochs[i // count][i % count] for i in range(first, first + number)]
