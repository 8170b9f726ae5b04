"""Statistics of measured numbers: confidence intervals and unbiased pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """Measured value, the bounds of its confidence interval (95% unless told otherwise), and the number measured on."""

    value: float
    low: float
    high: float
    n: int


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
    """Return the mean of one value per problem, with a percentile interval over resampled problems (Efron 1979).

    Problems are resampled, not samples: the samples of one problem are not independent trials of the model.
    """
    if not len(values):
        raise ValueError("the mean of no problems")
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(data.mean()), round(float(low), 4), round(float(high), 4), len(data))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, drawn without replacement, hold one of the c right ones: 1 - C(n-c, k) / C(n, k).

    Unbiased for the chance that k fresh samples do (Chen et al. 2021, arXiv:2107.03374, section 2.1).

    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
