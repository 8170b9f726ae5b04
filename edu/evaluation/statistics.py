"""The statistics that measured numbers carry: intervals, unbiased pass@k, and the paired comparison of two checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A measured value, the bounds of its confidence interval (95% unless told otherwise), and the number measured on."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints on the same problems. `difference` is the mean over problems of (second - first)."""

    difference: Interval
    better: int
    """Problems on which the second scored higher"""
    worse: int
    ties: int
    p_value: float
    """Two-sided exact sign test over the problems that are no ties"""


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): right for few trials and near 0 and 1.

    >>> wilson(8, 10)
    Interval(value=0.8, low=0.4902, high=0.9433, n=10)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: no proportion")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4), n)


def bootstrap_over_problems(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of one value per problem, with a percentile interval over resampled problems (Efron 1979).

    Problems are resampled, not samples: the samples of one problem are not independent trials of the model.
    """
    if not len(values):
        raise ValueError("the mean of no problems")
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(data.mean()), round(float(low), 4), round(float(high), 4), len(data))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones: 1 - C(n-c, k) / C(n, k).

    Unbiased for the chance that k fresh samples do (Chen et al. 2021, arXiv:2107.03374, section 2.1).

    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Paired comparison of two checkpoints from each one's mean reward per problem, the same problems in the same order."""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired comparison needs the same problems: {len(first)} and {len(second)} given")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        difference=bootstrap_over_problems(differences, seed=seed),
        better=better,
        worse=worse,
        ties=len(differences) - better - worse,
        p_value=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of "both directions are equally likely"; on right/wrong outcomes this is McNemar's exact test.

    >>> sign_test(better=9, worse=1)
    0.021484375
    """
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)
