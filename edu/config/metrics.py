"""Figures: what each is called and means, the file that keeps them, intervals in words, and progress on long work. No torch.

A stage writes one JSON object per step to `metrics.jsonl`:

    {"step": 20, "loss": 4.81, "lr": 0.02, "tokens": 40960, "tokens_per_second": 9812.0, "seconds": 4.2}

and what it measured at its end to `eval.json`, a tree of numbers in which an interval is `{"value": v, "low": l, "high": h, "n": n}`.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edu.data.atomic_io import write_text

STEP = "step"
LOSS = "loss"
VAL_LOSS = "val_loss"
BPB = "bpb"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
TOKENS = "tokens"
STEP_TOKENS = "step_tokens"
TOKENS_PER_SECOND = "tokens_per_second"
MFU = "mfu"
SECONDS = "seconds"
REWARD = "reward"
REWARD_STD = "reward_std"
ZERO_STD = "frac_reward_zero_std"
MEAN_LENGTH = "completions/mean_length"
CLIPPED_RATIO = "completions/clipped_ratio"
ENTROPY = "entropy"
KL = "kl"
CLIP_RATIO = "clip_ratio/region_mean"
PASS_AT_1 = "eval/pass@1"
PASS_AT_K = "eval/pass@k"

DEFINITIONS = {
    STEP: "optimizer steps taken since the stage began",
    LOSS: "training loss of the step: sum(w * -log p) / N in nats, before the update; in RL, w are advantages: no measure of progress",
    VAL_LOSS: "the same on held-out rows, in nats per target",
    BPB: "bits per byte on held-out text: bits to encode it divided by its bytes, so tokenizers compare; lower is better",
    LEARNING_RATE: "learning rate of the first parameter group in this step",
    GRAD_NORM: "2-norm of all gradients before clipping",
    TOKENS: "tokens trained on since the stage began, all processes together",
    STEP_TOKENS: "tokens trained on in this step, all processes together",
    TOKENS_PER_SECOND: "tokens trained on per second of this step, all processes together, data and rollouts included",
    MFU: "model-FLOPs utilisation: FLOPs of the step's forward and backward, per second, as a share of the devices' peak",
    SECONDS: "seconds of work since the stage began, restarts added up",
    REWARD: "mean reward of the step's completions on training problems; 1 is right, 0 is wrong",
    REWARD_STD: "standard deviation of the reward over the step's completions",
    ZERO_STD: "share of prompts whose completions all got the same reward, so that nothing is learnt from them",
    MEAN_LENGTH: "mean length of completions in tokens",
    CLIPPED_RATIO: "share of completions cut off by the token limit",
    ENTROPY: "mean entropy of the next-token distribution where the model sampled, in nats; near 0 means no exploration left",
    KL: "divergence from the reference model (k3 estimate), mean over sampled tokens and updates of the step, in nats",
    CLIP_RATIO: "share of sampled tokens whose probability ratio was clipped, over all updates of the step",
    PASS_AT_1: "share of samples that are right on held-out problems, mean over problems",
    PASS_AT_K: "share of held-out problems that at least one of k samples solves, k the largest power of two in --eval-samples",
}


def _plain(value: object) -> object:
    """A JSON value: numbers of torch and numpy become Python's, and what is not finite becomes null.

    >>> _plain(float("nan")), _plain(3), _plain("text")
    (None, 3, 'text')
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, oldest first; none if there is no file. A last line torn by a kill is left out.

    Raises ValueError, naming file and line, where another line is not a JSON object.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):  # the text after the last newline is what a kill leaves half-written
            raise ValueError(f"{path}, line {number}: not a JSON object; delete the line to go on without it")
    return rows


class MetricsLog:
    """Appends one JSON line per step to a file, flushed at once; one process of a run owns it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsLog(Path(folder) / "metrics.jsonl") as log:
    ...         for step in range(5):
    ...             log.write(step, {LOSS: 4.0 - step})
    ...         log.keep(lambda row: row[STEP] <= 1)
    ...     read_metrics(Path(folder) / "metrics.jsonl")
    [{'step': 0, 'loss': 4.0}, {'step': 1, 'loss': 3.0}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._write(read_metrics(path))  # else the next row would be glued to a torn one
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append the row of a step; an OSError (a full disk) names the file."""
        row = {STEP: step} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the rows for which `wanted` is true. All or nothing: a kill leaves the old file or the new."""
        self._file.close()
        self._write([row for row in read_metrics(self.path) if wanted(row)])
        self._file = self.path.open("a", encoding="utf-8")

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def close(self) -> None:
        with suppress(OSError):  # of a row that `write` has complained about
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Measure:
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
    """Whether it is a share of examples, shown in per cent."""

    def __str__(self) -> str:
        """
        >>> str(Measure(0.45, 0.394, 0.507, 300, share=True)), str(Measure(0.98765))
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
_SHARES = ("accuracy", "pass@", "rate", "share", "fraction")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def measures(tree: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Measure]]:
    """Walk a tree of numbers and yield each with its path; text, lists and flags are passed over.

    >>> for path, measure in measures({"greedy": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 96}, "bpb": 0.93}):
    ...     print(" / ".join(path), "=", measure)
    greedy = 50.0% [40.0, 60.0], n=96
    bpb = 0.930
    """
    if not isinstance(tree, Mapping):
        number = _number(tree)
        if number is not None:
            yield path, Measure(number, share=any(name in path[-1].lower() for name in _SHARES) if path else False)
        return
    tree = {str(name): value for name, value in tree.items()}
    estimate = next((name for name in _ESTIMATES if _number(tree.get(name)) is not None), None)
    low, high, n = (_number(tree.get(name)) for name in ("low", "high", "n"))
    used: set[str] = set()
    if estimate is not None and (low is not None or n is not None):
        value = float(tree[estimate])
        share = any(name in estimate for name in _SHARES) or (n is not None and 0 <= value <= 1 and BPB not in path)
        label = (*path, estimate) if estimate.startswith("pass@") or not path else path
        used = {estimate, "low", "high", "n"}
        yield label, Measure(value, low, high, int(n) if n is not None and math.isfinite(n) else None, share)
    for name, value in tree.items():
        if name not in used:
            yield from measures(value, (*path, name))


def is_detail(path: tuple[str, ...]) -> bool:
    """Whether a figure is about a part of what was measured: a kind of problem, how answers ended."""
    return any(name.startswith("by_") or name == "answers" for name in path)


def duration(seconds: float) -> str:
    """
    >>> duration(7.4), duration(83), duration(3 * 3600 + 62)
    ('7 s', '1 min 23 s', '3 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """How far a long work is: `advance` counts, and `show` (a bar's update, or a log's line) is called with the figures."""

    def __init__(self, total: int, description: str, done: int = 0, show: Callable[[str], None] | None = None) -> None:
        self.total, self.description, self.done, self.tokens = total, description, done, 0
        self.show = show or self._line
        self._first, self._started = done, time.monotonic()
        self._last_line = (done, self._started)

    def advance(self, steps: int = 1, tokens: int = 0, **figures: float) -> None:
        """Count `steps` of the total and the tokens they took; `figures` (a loss) are shown beside."""
        self.done += steps
        self.tokens += tokens
        elapsed = max(time.monotonic() - self._started, 1e-9)
        left = elapsed / max(self.done - self._first, 1) * max(self.total - self.done, 0)
        parts = [f"{self.tokens / elapsed:,.0f} tokens/s"] if self.tokens else []
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        parts.append(f"{duration(left)} left" if self.done < self.total else f"{duration(elapsed)} in all")
        self.show(", ".join(parts))

    def _line(self, text: str) -> None:
        """One plain line each tenth of the work or half a minute, for logs."""
        done, at = self._last_line
        now = time.monotonic()
        if self.done >= self.total or self.done - done >= self.total / 10 or now - at >= 30:
            self._last_line = (self.done, now)
            percent = 100 * self.done // max(self.total, 1)
            print(f"{self.description}: {self.done:,}/{self.total:,} ({percent}%), {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, description: str, *, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr: a bar with tokens/s and time left in a terminal, a plain line now and then elsewhere.

    `done` is where a resumed work starts; `quiet` shows nothing (processes other than the main one).

    >>> with progress(100, "reading", quiet=True) as bar:
    ...     bar.advance(50, tokens=1000, loss=2.5)
    >>> bar.done, bar.tokens
    (50, 1000)
    """
    if quiet or not sys.stderr.isatty():
        yield Progress(total, description, done, show=(lambda _: None) if quiet else None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, completed=done, text="")
        state = Progress(total, description, done, lambda text: bars.update(task, completed=state.done, text=text))
        yield state
