"""The objective of RL as numbers: what each sampled token weighs in sum(w * -log p) / N.

Every objective in docs/rl.md has the gradient sum(w * grad log p) over the sampled tokens. So each is computed as numbers
w before the update, and the loss and the step are those of pretraining.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from edu.config.rl import Advantage, Normalization

STD_FLOOR = 1e-4  # added to the standard deviation, as TRL does: a group of nearly equal rewards must not explode


def advantages(rewards: Sequence[float], kind: Advantage = "mean") -> list[float]:
    """Return each answer's reward minus a baseline from its group; all zero where the rewards are equal.

    mean: reward - mean (Dr. GRPO, arXiv:2503.20783). mean_std: that, divided by the standard deviation (GRPO,
    arXiv:2402.03300). leave_one_out: reward - mean of the others (RLOO, arXiv:2402.14740).

    >>> advantages([1.0, 0.0, 0.0, 0.0])
    [0.75, -0.25, -0.25, -0.25]
    >>> advantages([1.0, 0.0], "leave_one_out"), [round(a, 3) for a in advantages([1.0, 0.0], "mean_std")]
    ([1.0, -1.0], [0.707, -0.707])
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, K = fmean(rewards), len(rewards)
    # leave_one_out: K / (K - 1) * (reward - mean of all) = reward - mean of the others
    factor = {"mean": 1.0, "mean_std": 1 / (stdev(rewards) + STD_FLOOR), "leave_one_out": K / (K - 1)}[kind]
    return [factor * (reward - mean) for reward in rewards]


def length_weight(length: int, kind: Normalization) -> float:
    """Return the weight of one token of an answer, its advantage aside."""
    return 1 / length if kind == "sequence" else 1.0


def normalizer(lengths: Sequence[int], kind: Normalization, longest: int) -> int:
    """Return N for answers of these lengths in sampled tokens.

    token: all their tokens (DAPO, arXiv:2503.14476). sequence: the answers, each of which is a mean over its own tokens
    (GRPO). constant: the answers times the longest allowed (Dr. GRPO).
    """
    return {"token": sum(lengths), "sequence": len(lengths), "constant": len(lengths) * longest}[kind]


@dataclass(frozen=True)
class Surrogate:
    """The clipped objective and the KL of one answer at the present policy, an entry per token."""

    weights: np.ndarray
    """w such that the gradient of sum(w * -log p) is minus that of min(ratio A, clip(ratio) A) - kl * k3, to be maximized."""
    clipped: np.ndarray
    """Mask of tokens whose ratio is beyond its bound in the direction that the advantage pushes: no gradient."""
    kl: np.ndarray
    """Estimate k3 of the KL to the reference, unbiased and never negative."""


def surrogate(
    advantage: float, now: np.ndarray, old: np.ndarray, reference: np.ndarray, *, low: float, high: float, kl: float
) -> Surrogate:
    """PPO's clipped objective (arXiv:1707.06347) with DAPO's two bounds, and GRPO's KL, from log p of the sampled tokens.

    now, old, reference: under the policy trained, the one that sampled, and the one to stay near. With x = reference - now,
    k3 = exp(x) - x - 1, and -grad k3 = (exp(x) - 1) grad log p.

    >>> at_1 = surrogate(0.5, *np.log([[0.2], [0.2], [0.2]]), low=0.2, high=0.28, kl=0.1)
    >>> at_1.weights.tolist(), at_1.clipped.tolist(), at_1.kl.tolist()
    ([0.5], [False], [0.0])
    """
    ratio, apart = np.exp(now - old), reference - now
    # Beyond the bound in the direction A pushes: too likely already and A > 0, or too unlikely already and A < 0.
    clipped = ratio > 1 + high if advantage > 0 else (ratio < 1 - low) & (advantage < 0)
    weights = np.where(clipped, 0.0, ratio * advantage) + kl * np.expm1(apart)
    return Surrogate(weights, clipped, np.expm1(apart) - apart)
