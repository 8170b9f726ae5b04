"""Measured numbers with their intervals, and the walk over an `eval.json` that finds them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edu.config.metrics import BPB


@dataclass(frozen=True)
class Estimate:
    """One measured number of an `eval.json`, with what is known of its certainty."""

    value: float
    """The estimate; NaN where the file holds no number."""
    low: float | None = None
    """Lower end of its 95% interval."""
    high: float | None = None
    """Upper end of its 95% interval."""
    n: int | None = None
    """Number of examples it was measured on."""
    share: bool = False
    """True for a share of examples, which is shown in percent."""

    def __str__(self) -> str:
        """
        >>> str(Estimate(0.45, 0.394, 0.507, 300, share=True)), str(Estimate(0.98765))
        ('45.0% [39.4, 50.7], n=300', '0.988')
        """
        if not math.isfinite(self.value):
            return "not a number"
        scale, digits = (100, ".1f") if self.share else (1, ",.3f" if abs(self.value) < 100 else ",.0f")
        text = f"{self.value * scale:{digits}}" + ("%" if self.share else "")
        if self.low is not None and self.high is not None:
            text += f" [{self.low * scale:{digits}}, {self.high * scale:{digits}}]"
        return text + (f", n={self.n}" if self.n is not None else "")


_ESTIMATES = ("accuracy", "value", "mean", "pass@1", "rate")  # the name of an interval's own number, first found
_DEEPEST = 20  # levels of a tree that are looked at
_SHARES = ("accuracy", "pass@", "rate", "share", "fraction")


def _number(value: object) -> float | None:
    """Return a number as a float, infinite for an integer that no float can hold; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else math.inf


def finite(value: object) -> float | None:
    """Return a finite number as a float, None for anything else."""
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def estimates(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Estimate]]:
    """Walk a tree of numbers and yield each with its path; text, lists and flags are passed over.

    >>> for path, estimate in estimates({"greedy": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 96}, "bpb": 0.93}):
    ...     print(" / ".join(path), "=", estimate)
    greedy = 50.0% [40.0, 60.0], n=96
    bpb = 0.930
    """
    if len(path) > _DEEPEST:
        return
    if not isinstance(tree, Mapping):
        number = _number(tree)
        if number is not None:
            yield path, Estimate(number, share=any(name in path[-1].lower() for name in _SHARES) if path else False)
        return
    tree = {str(name): value for name, value in tree.items()}
    estimate = next((name for name in _ESTIMATES if _number(tree.get(name)) is not None), None)
    low, high, n = (_number(tree.get(name)) for name in ("low", "high", "n"))
    used: set[str] = set()
    if estimate is not None and (low is not None or n is not None):
        value = _number(tree[estimate]) or 0.0
        share = any(name in estimate for name in _SHARES) or (n is not None and 0 <= value <= 1 and BPB not in path)
        label = (*path, estimate) if estimate.startswith("pass@") or not path else path
        used = {estimate, "low", "high", "n"}
        yield label, Estimate(value, low, high, int(n) if n is not None and math.isfinite(n) else None, share)
    for name, value in tree.items():
        if name not in used:
            yield from estimates(value, (*path, name))


def is_detail(path: tuple[str, ...]) -> bool:
    """Return whether an estimate is about a part of what was measured: a kind of problem, how answers ended."""
    return any(name.startswith("by_") or name == "answers" for name in path)
