"""The report of a run: what its stages wrote, as one self-contained HTML page and as Markdown. No torch.

    runs/tiny/{base,sft,rl}/{config.yaml, metrics.jsonl, eval.json, samples.jsonl} -> report.html, report.md, report/*.svg

1. `read_stage` reads what a stage left; whatever is missing or broken becomes a note, never a crash.
2. `sections` arranges it: tables, curves, chats before and after.
3. `write_report` prints the same sections twice, as HTML and as Markdown.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from edu.config import metrics
from edu.config.metrics import LOSS, REWARD
from edu.config.terminal import duration
from edu.data.metrics_log import read_metrics
from edu.evaluation.estimates import Measure, is_detail, measures
from edu.evaluation.page import Block, Chat, Facts, Plot, Section, Table, plot, to_html, to_markdown

TITLES = {"base": "Pretraining", "sft": "Supervised fine-tuning", "rl": "Reinforcement learning"}


@dataclass
class Stage:
    """What one stage left in its folder."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read, in words."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, in order, where both are numbers."""
        points = [(row.get(metrics.STEP), row.get(name)) for row in self.rows]
        known = sorted((x, y) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float))
        return [x for x, _ in known], [y for _, y in known]

    def last(self, name: str) -> float | None:
        return (self.curve(name)[1] or [None])[-1]

    @property
    def seconds(self) -> float | None:
        """The stage's time: as its evaluation says, else as its last step says."""
        told = self.evaluation.get(metrics.SECONDS)
        return float(told) if isinstance(told, int | float) else self.last(metrics.SECONDS)


def read_stage(folder: Path) -> Stage:
    """Read what a stage left in its folder; what is missing or broken is said in `notes`."""
    stage = Stage(folder.name)
    if not folder.is_dir():
        stage.notes.append(f"No {folder.name}/ in the run: this stage has not been run.")
        return stage

    def load(name: str, read: Callable[[Path], Any], kind: type) -> Any:
        path = folder / name
        if not path.is_file():
            stage.notes.append(f"{folder.name}/{name} is missing.")
            return kind()
        try:
            value = read(path)
        except (ValueError, OSError, yaml.YAMLError) as error:
            stage.notes.append(f"{folder.name}/{name} could not be read: {error}".replace(str(folder), folder.name))
            return kind()
        return value if isinstance(value, kind) else kind()

    stage.rows = load("metrics.jsonl", read_metrics, list)
    stage.evaluation = load("eval.json", lambda path: json.loads(path.read_text(encoding="utf-8")), dict)
    stage.samples = load("samples.jsonl", read_metrics, list)
    stage.settings = load("config.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    return stage


def _plot(stage: Stage, names: Sequence[str], caption: str, levels: Mapping[str, float] | None = None) -> list[Plot]:
    """One figure of some of a stage's metrics; [] where none of them was recorded."""
    curves = {name: curve for name in names if (curve := stage.curve(name))[0]}
    slug = re.sub(r"\W+", "_", f"{stage.name}_{'_'.join(curves)}")
    return [plot(slug, caption, curves, levels or {})] if curves else []


def _plots(stage: Stage) -> list[Plot]:
    """Every curve of a stage that is worth looking at, and that was measured."""
    bpb = stage.evaluation.get(metrics.BPB)
    tree = {path[-1]: m.value for path, m in measures(bpb) if path} if isinstance(bpb, dict) else {}
    levels = {name: tree[name] for name in ("unigram", "bigram") if name in tree}
    passes = sorted({name for row in stage.rows for name in row if "pass@" in name}, key=lambda name: (len(name), name))
    loss = "Loss, which for rewards is no measure of progress" if stage.curve(REWARD)[0] else "Loss, nats per target"
    return [
        *_plot(stage, [LOSS, metrics.VAL_LOSS], loss),
        *_plot(stage, [metrics.BPB], "Bits per byte on held-out text, lower is better", levels),
        *_plot(stage, [REWARD], "Mean reward on training problems"),
        *_plot(stage, passes, "Right answers on held-out problems, as a share"),
        *_plot(stage, [metrics.MEAN_LENGTH], "Mean length of completions, tokens"),
        *_plot(stage, [metrics.ZERO_STD, metrics.CLIPPED_RATIO], "Prompts that teach nothing; answers cut off"),
        *_plot(stage, [metrics.ENTROPY], "Entropy where the model samples, nats"),
    ]


def _comparison(stages: Sequence[Stage], wanted: Callable[[tuple[str, ...]], bool]) -> list[Block]:
    """A table for each thing measured whose figures are `wanted`: a row a figure, a column a stage."""
    found: dict[str, dict[tuple[str, ...], dict[str, Measure]]] = {}
    for stage in stages:
        for path, measure in measures(stage.evaluation):
            if len(path) > 1 and wanted(path):
                found.setdefault(path[0], {}).setdefault(path[1:], {})[stage.name] = measure
    blocks: list[Block] = []
    for topic, rows in found.items():
        columns = [stage for stage in stages if any(stage.name in row for row in rows.values())]
        cells = [[" / ".join(path), *(str(row.get(s.name, "–")) for s in columns)] for path, row in rows.items()]
        header = [topic.replace("_", " "), *(f"after {s.name}" for s in columns)]
        blocks.append(Table(header, [[cell.replace("_", " ") for cell in row] for row in cells]))
    return blocks


def _text(value: object) -> str:
    """A prompt or completion as text: a string as it is, messages as lines of `role: content`."""
    if isinstance(value, list):
        lines = [f"{m.get('role', '?')}: {m.get('content', '')}" for m in value if isinstance(m, dict)]
        return "\n".join(lines) or json.dumps(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _chats(stage: Stage, most: int = 12) -> list[Block]:
    """For each prompt sampled, its answer before the stage (the first step sampled) and after it (the last)."""
    prompts: dict[str, list[tuple[float, str]]] = {}
    for row in stage.samples:
        if "prompt" in row and "completion" in row:
            step = row.get(metrics.STEP)
            at = float(step) if isinstance(step, int | float) else 0.0
            prompts.setdefault(_text(row["prompt"]), []).append((at, _text(row["completion"])))
    chats: list[Block] = []
    for prompt, answers in list(prompts.items())[:most]:
        answers.sort(key=lambda answer: answer[0])
        ends = answers[:1] if answers[0][0] == answers[-1][0] else [answers[0], answers[-1]]
        chats.append(Chat(prompt, [(f"step {at:,.0f}", text) for at, text in ends]))
    return chats


def _overview(stages: Sequence[Stage]) -> Table:
    """What each stage cost and how far its loss, or its reward, came."""
    rows: list[Sequence[str]] = []
    for stage in stages:
        name = REWARD if stage.curve(REWARD)[0] else LOSS
        steps, values = stage.curve(name)
        ends = f"{name} {values[0]:.3g} → {sum(values[-10:]) / len(values[-10:]):.3g}" if values else "–"
        tokens = stage.last(metrics.TOKENS) or sum(stage.curve(metrics.STEP_TOKENS)[1]) or None
        counts = (steps[-1] if steps else None, tokens, stage.last(metrics.TOKENS_PER_SECOND))
        shown = ["–" if count is None else f"{count:,.0f}" for count in counts]
        time = "–" if stage.seconds is None else duration(stage.seconds)
        rows.append([TITLES[stage.name], *shown, ends, time])
    return Table(["stage", "steps", "tokens", "tokens/s", "first step → last ten", "time"], rows)


def _headline(stages: Sequence[Stage]) -> Facts:
    """The story in a few numbers: only those that were measured."""
    items: list[tuple[str, str]] = []
    for stage in stages:
        if bits := stage.curve(metrics.BPB)[1]:
            items.append((f"{bits[0]:.2f} → {bits[-1]:.2f}", f"bits per byte of held-out text, along {stage.name}"))
            break
    found = {(s.name, *path): measure for s in stages for path, measure in measures(s.evaluation)}
    for topic, wanted in (("persona", ""), ("math", "pass@1")):
        keys = [key for key in found if key[1:2] == (topic,) and len(key) > 2 and wanted in key[-1]]
        same = [key for key in keys if key[1:] == keys[0][1:]]
        if same:
            values = " → ".join(f"{found[key].value:.0%}" for key in same)
            name = " ".join(same[0][1:]).replace("_", " ")
            items.append((values, f"{name}, after {' → '.join(key[0] for key in same)}"))
    items.append((duration(sum(stage.seconds or 0 for stage in stages)), "for all stages together"))
    return Facts(items)


def sections(run: Path) -> list[Section]:
    """Everything the report says of a run, in order.

    Raises ValueError where the folder does not exist or holds no stage.
    """
    if not any((run / name).is_dir() for name in TITLES):
        raise ValueError(f"--run {run}: no base/, sft/ or rl/ in it; name the folder of a run, such as runs/tiny")
    stages = [read_stage(run / name) for name in TITLES]
    unmeasured = "No stage has been measured yet: an eval.json in its folder would show here."
    result = [Section("The run", [_headline(stages), _overview(stages)])]
    for stage in stages:
        blocks = [*stage.notes, *_plots(stage)]
        result.append(Section(TITLES[stage.name], blocks or ["Nothing was recorded."]))
    result.append(Section("What was measured", _comparison(stages, lambda path: not is_detail(path)) or [unmeasured]))
    if kinds := _comparison(stages, lambda path: "sampled" in path and path[-2] in ("by_kind", "by_steps")):
        result.append(Section("Problems by kind and by number of steps: share of samples that are right", kinds))
    if details := _comparison(stages, is_detail):
        result.append(Section("All other figures", details, folded=True))
    chats = [(stage.name, _chats(stage)) for stage in stages]
    result += [Section(f"{TITLES[name]}: samples before and after", found) for name, found in chats if found]
    recorded = [found for stage in stages if isinstance(found := stage.evaluation.get("environment"), dict)]
    machine = [[str(name), _text(value)] for name, value in (recorded[-1] if recorded else {}).items()]
    if machine:
        result.append(Section("Environment", [Table(["of the run", ""], machine)]))
    for stage in stages:
        if stage.settings:
            rows = [[name, _text(value)] for name, value in stage.settings.items()]
            result.append(Section(f"Settings of {stage.name}", [Table(["setting", "value"], rows)], folded=True))
    seen = {name for stage in stages for row in stage.rows for name in row}
    named = [[name, meaning] for name, meaning in metrics.DEFINITIONS.items() if name in seen]
    return [*result, Section("What the names mean", [Table(["metric", "meaning"], named)], folded=True)]


def write_report(run: Path) -> Path:
    """Write report.html, report.md and its figures (report/*.svg) into the run's folder; gives the page's path.

    Raises ValueError where `run` is not the folder of a run.
    """
    parts = sections(run)
    title = f"{run.resolve().name}: the life of a small chat model"
    subtitle = f"Written {datetime.now():%Y-%m-%d %H:%M}. Square brackets hold 95% intervals."
    figures = run / "report"
    figures.mkdir(exist_ok=True)
    for block in (block for section in parts for block in section.blocks):
        if isinstance(block, Plot):
            (figures / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    (run / "report.md").write_text(to_markdown(title, subtitle, parts, figures.name), encoding="utf-8")
    page = run / "report.html"
    page.write_text(to_html(title, subtitle, parts), encoding="utf-8")
    return page
