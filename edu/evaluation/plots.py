"""Curves of a run as SVG figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from warnings import catch_warnings, filterwarnings

from edu.config.terminal import printable

# Colors of a curve, of text and lines beside it, and of the grid, readable on white and on black; a page has its own.
ACCENT, INK, FAINT = "#0f766e", "#7c858d", "#c3c9ce"
_THEME = {ACCENT: "var(--accent)", INK: "var(--soft)", FAINT: "var(--line)"}


@dataclass(frozen=True)
class Plot:
    """A figure as SVG text; `name` is its file's."""

    name: str
    caption: str
    svg: str

    @property
    def themed(self) -> str:
        """The SVG in the colors of the page around it, which follow the reader's light or dark mode."""
        svg = self.svg
        for color, variable in _THEME.items():
            svg = svg.replace(color, variable)
        return svg


Curve = tuple[Sequence[float], Sequence[float]]


def plot(name: str, caption: str, curves: Mapping[str, Curve], levels: Mapping[str, float]) -> Plot:
    """Draw curves (label -> steps, values) and dashed horizontal lines at `levels` (label -> value).

    A curve of more than 60 points is drawn faint, under its running mean over a 20th of them.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with (
        catch_warnings(),
        rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "text.parse_math": False,
                "font.size": 9,
                "axes.unicode_minus": False,
            }
        ),
    ):
        filterwarnings("ignore", "Glyph .* missing")  # of a name in another script: the reader's font has it
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for (label, (steps, values)), style in zip(curves.items(), ("-", "--", ":", "-.") * len(curves), strict=False):
            half = len(values) // 40 if len(values) > 60 else 0
            parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
            means = [sum(part) / len(part) for part in parts]
            if half:
                axes.plot(steps, values, color=INK, alpha=0.45, linewidth=0.5)
            marker = "o" if len(values) < 12 else ""
            axes.plot(steps, means, style, color=ACCENT, linewidth=1.7, marker=marker, markersize=3.5, label=label)
        for label, level in levels.items():
            axes.axhline(level, color=INK, linestyle=(0, (4, 3)), linewidth=0.9)
            text = f"{label} {level:.3g}"
            place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate(text, (1, level), ha="right", va="bottom", color=INK, **place)
        axes.set_xlabel("step", color=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.4)
        axes.tick_params(colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, caption, printable(out.getvalue()[out.getvalue().index("<svg") :]))
