"""Paired comparison of two checkpoints on the same problems, and the files that keep evaluations."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from edu.data.rows import read_rows, text_field
from edu.evaluation.evals import Evaluation, Record, save_records
from edu.evaluation.statistics import Interval, bootstrap_over_problems


@dataclass(frozen=True)
class Comparison:
    """Result of two checkpoints on the same problems. `difference` is the mean over problems of (second - first)."""

    difference: Interval
    better: int
    """Problems on which the second scored higher"""
    worse: int
    ties: int
    p_value: float
    """Two-sided exact sign test over the problems that are no ties"""


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compare two checkpoints in pairs, from each one's mean reward per problem, the same problems in the same order."""
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
    """Return the two-sided exact p-value of "both directions are equally likely"; on right/wrong outcomes this is McNemar's exact test.

    >>> sign_test(better=9, worse=1)
    0.021484375
    """
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare_records(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare two checkpoints in pairs, from their records of the same task."""
    if [r["prompt"] for r in first] != [r["prompt"] for r in second]:
        raise ValueError("the two evaluations are not of the same problems: use the same task, data and limit")
    return compare(
        [fmean(sample["reward"] for sample in r["samples"]) for r in first],
        [fmean(sample["reward"] for sample in r["samples"]) for r in second],
    )


def save(path: Path, about: dict[str, Any], evaluations: dict[str, Evaluation]) -> None:
    """Write `path` (what was measured on what, and the summaries) and, beside it, the records of all as `.jsonl`."""
    save_records(path.with_suffix(".jsonl"), evaluations)
    summaries = {name: evaluation.summary for name, evaluation in evaluations.items()}
    path.write_text(json.dumps(about | {"results": summaries}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_records(path: Path) -> dict[str, list[Record]]:
    """Return the records of each task, from the `.json` or `.jsonl` of a saved evaluation."""
    records: dict[str, list[Record]] = {}
    for place, record in read_rows(path.with_suffix(".jsonl")):
        records.setdefault(text_field(record, "task", place), []).append(record)
    return records
