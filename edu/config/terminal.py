"""Output for people: durations in words, text that cannot steer a terminal, and progress bars."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# C0 and C1 control characters but newline and tab, and the marks that reorder text (Unicode TR9).
_CONTROLS = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS}


def printable(text: object) -> str:
    r"""Return text in which control characters are shown as escapes: what a model or a data set says never steers the terminal.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return str(text).translate(_VISIBLE)


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
    """Progress of a long job, counted by `advance`."""

    def __init__(self, total: int, description: str, done: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.lines = not quiet and not sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.bars = Bars(*columns, console=Console(stderr=True), disable=quiet or self.lines)
        self.task = self.bars.add_task(description, total=total, completed=done, text="")
        self.description, self.total, self.done, self.first, self.tokens = description, total, done, done, 0
        self.started = time.monotonic()
        self.last_line = (done, self.started)

    def advance(self, steps: int = 1, tokens: int = 0, **metrics: float) -> None:
        """Count `steps` of the total and the tokens they took; `metrics` (a loss) are shown beside."""
        self.done += steps
        self.tokens += tokens
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        left = elapsed / max(self.done - self.first, 1) * max(self.total - self.done, 0)
        parts = [f"{self.tokens / elapsed:,.0f} tokens/s"] if self.tokens else []
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        parts.append(f"{duration(left)} left" if self.done < self.total else f"{duration(elapsed)} in all")
        text = ", ".join(parts)
        self.bars.update(self.task, completed=self.done, text=text)
        steps_ago, seconds_ago = self.done - self.last_line[0], now - self.last_line[1]
        if self.lines and (self.done >= self.total or steps_ago >= self.total / 10 or seconds_ago >= 30):
            self.last_line = (self.done, now)
            place = f"{self.done:,}/{self.total:,} ({100 * self.done // max(self.total, 1)}%)"
            print(f"{self.description}: {place}, {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, description: str, *, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Show progress on stderr: a bar on a terminal; elsewhere a line each tenth of the work or half a minute.

    `done` is where resumed work starts; `quiet` shows nothing (processes other than the main one).

    >>> with progress(100, "reading", quiet=True) as bar:
    ...     bar.advance(50, tokens=1000, loss=2.5)
    >>> bar.done, bar.tokens
    (50, 1000)
    """
    bar = Progress(total, description, done, quiet)
    with bar.bars:
        yield bar
