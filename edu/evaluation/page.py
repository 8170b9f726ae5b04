"""Blocks of a report (text, facts, table, plot, chat) and how they print: one self-contained HTML page, or Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

# A curve's colour, that of text and lines beside it, the grid's: readable on white and on black. The page puts its own for them.
ACCENT, INK, FAINT = "#0f766e", "#7c858d", "#c3c9ce"

STYLE = """
:root { --page: #fff; --text: #1c2329; --soft: #5f6b75; --line: #e3e7ea; --accent: #0f766e; --said: #f5f7f7; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181b; --text: #e4e8ea; --soft: #96a1a9; --line: #2b3238; --accent: #4fb8ac; --said: #1b2125 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.1rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p, summary { color: var(--soft); max-width: 44rem }
summary { cursor: pointer; margin-top: 1.2rem }
.wide { overflow-x: auto; margin: 0 0 1.4rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--accent) }
th, td { padding: .35rem 1.1rem .35rem 0; vertical-align: top; overflow-wrap: break-word }
td { border-bottom: 1px solid var(--line) }
td:last-child, th:last-child { padding-right: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.4rem 2rem }
figure { margin: 0 } figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem } svg { width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 12rem), 1fr)); gap: 1rem 2rem; margin: 1.6rem 0 }
.facts b { display: block; font-size: 1.5rem; line-height: 1.3; color: var(--accent); font-variant-numeric: tabular-nums }
.chat { margin: 0 0 1.6rem } .chat > b { display: block; white-space: pre-wrap }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .6rem; margin-top: .4rem }
.answers div { background: var(--said); border-left: 3px solid var(--line); padding: .5rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
.answers div:last-child { border-color: var(--accent) } small { color: var(--soft); display: block }
"""


@dataclass(frozen=True)
class Table:
    """Cells as text, a row at a time."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure as SVG text; `name` is its file's."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Chat:
    """A prompt and its answers, each with a word on when it was given."""

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """A few numbers to see first, each with what it is."""

    items: Sequence[tuple[str, str]]


Block = str | Table | Plot | Chat | Facts


@dataclass(frozen=True)
class Section:
    """A title and what is under it; a folded one shows only on demand."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


Curve = tuple[Sequence[float], Sequence[float]]


def plot(name: str, caption: str, curves: Mapping[str, Curve], levels: Mapping[str, float]) -> Plot:
    """Draw curves (label -> steps, values) and dashed horizontal lines at `levels` (label -> value).

    A curve of more than 60 points is drawn faint, under its running mean over a 20th of them.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.unicode_minus": False}):
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
    return Plot(name, caption, out.getvalue()[out.getvalue().index("<svg") :])


def _html_block(block: Block) -> str:
    match block:
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
            return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"
        case Plot(_, caption, svg):
            colours = {ACCENT: "var(--accent)", INK: "var(--soft)", FAINT: "var(--line)"}
            for colour, variable in colours.items():
                svg = svg.replace(colour, variable)
            return f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>"
        case Chat(prompt, answers):
            said = "".join(f"<div><small>{html.escape(at)}</small>{html.escape(text)}</div>" for at, text in answers)
            return f'<div class="chat"><b>{html.escape(prompt)}</b><div class="answers">{said}</div></div>'
        case Facts(items):
            tiles = (
                f"<div><b>{html.escape(number)}</b><small>{html.escape(what)}</small></div>" for number, what in items
            )
            return f'<div class="facts">{"".join(tiles)}</div>'
    return f"<p>{html.escape(block)}</p>"


def to_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page: style and figures are inside it, it loads nothing."""
    parts = []
    for section in sections:
        plots = "".join(_html_block(block) for block in section.blocks if isinstance(block, Plot))
        rest = "\n".join(_html_block(block) for block in section.blocks if not isinstance(block, Plot))
        body = rest + (f'<div class="plots">{plots}</div>' if plots else "")
        name = html.escape(section.title)
        parts.append(
            f"<details><summary>{name}</summary>{body}</details>" if section.folded else f"<h2>{name}</h2>{body}"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _markdown_block(block: Block, folder: str) -> str:
    match block:
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)
        case Plot(name, caption, _):
            return f"**{caption}**\n\n![{caption}]({folder}/{name}.svg)"
        case Chat(prompt, answers):
            said = (f"{at}:\n\n" + re.sub("^", "    ", text, flags=re.MULTILINE) for at, text in answers)
            return f"**{_cell(prompt)}**\n\n" + "\n\n".join(said)
        case Facts(items):
            return "\n".join(f"- **{_cell(number)}**: {_cell(what)}" for number, what in items)
    return block


def _cell(text: str) -> str:
    """Text on one line of Markdown, with nothing in it taken for markup.

    >>> print(_cell("a|b <|bos|>"))
    a\\|b &lt;\\|bos\\|&gt;
    """
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", html.escape(text, quote=False)).replace("\n", "<br>")


def to_markdown(title: str, subtitle: str, sections: Sequence[Section], folder: str) -> str:
    """The same in Markdown, its plots as images in `folder`."""
    parts = [f"# {title}", subtitle]
    for section in sections:
        parts += [f"## {section.title}", *(_markdown_block(block, folder) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"
