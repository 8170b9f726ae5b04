"""The report of a run: what its stages wrote, as one self-contained HTML page and as Markdown. No torch.

    runs/tiny/{base,sft,rl}/{config.yaml, metrics.jsonl, eval.json, samples.jsonl} -> report.html, report.md, report/*.svg

1. `read_stage` reads what a stage left; whatever is missing or broken becomes a note, never a crash.
2. `sections` arranges it: tables, curves, chats before and after.
3. `write_report` fills two templates with the same sections.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from edu.config import metrics
from edu.config.metrics import LOSS, REWARD
from edu.config.reading import read_json, read_yaml
from edu.config.terminal import duration
from edu.data.metrics_log import read_metrics
from edu.evaluation.estimates import Estimate, estimates, finite, is_detail
from edu.evaluation.plots import Plot, plot
from edu.evaluation.rendering import render

TITLES = {"base": "Pretraining", "sft": "Supervised fine-tuning", "rl": "Reinforcement learning"}
SAMPLED_PROMPTS = 12  # prompts of a stage whose answers are shown


@dataclass(frozen=True)
class Table:
    """Cells as text, a row at a time."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chat:
    """A prompt and its answers, each with the step at which it was given."""

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A title and what is under it, in the order of the fields; a folded one opens on demand."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """A few numbers to see first, each with its meaning."""
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    chats: Sequence[Chat] = ()
    plots: Sequence[Plot] = ()
    folded: bool = False


@dataclass(frozen=True)
class Stage:
    """Files that one stage left in its folder."""

    name: str
    rows: list[dict[str, Any]]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """Notes on what is missing or could not be read."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric, in order, where both are finite numbers."""
        points = [(finite(row.get(metrics.STEP)), finite(row.get(name))) for row in self.rows]
        known = sorted((x, y) for x, y in points if x is not None and y is not None)
        return [x for x, _ in known], [y for _, y in known]

    def last(self, name: str) -> float | None:
        return (self.curve(name)[1] or [None])[-1]

    @property
    def seconds(self) -> float | None:
        """Time of the stage: as its evaluation says, else as its last step says."""
        told = finite(self.evaluation.get(metrics.SECONDS))
        return self.last(metrics.SECONDS) if told is None else told


def read_stage(folder: Path) -> Stage:
    """Read what a stage left in its folder; what is missing or broken is said in `notes`."""
    notes: list[str] = []

    def load(name: str, read: Callable[[Path], Any], kind: type) -> Any:
        path = folder / name
        try:
            if path.is_file():
                value = read(path)
                return value if isinstance(value, kind) else kind()
            notes.append(f"{folder.name}/{name} is missing.")
        except (ValueError, OSError) as error:
            notes.append(f"{folder.name}/{name} could not be read: {error}".replace(str(folder), folder.name))
        return kind()

    if not folder.is_dir():
        notes.append(f"No {folder.name}/ in the run: this stage has not been run.")
        return Stage(folder.name, [], {}, [], {}, notes)
    return Stage(
        folder.name,
        rows=load("metrics.jsonl", read_metrics, list),
        evaluation=load("eval.json", read_json, dict),
        samples=load("samples.jsonl", read_metrics, list),
        settings=load("config.yaml", read_yaml, dict),
        notes=notes,
    )


def _plots(stage: Stage) -> list[Plot]:
    """Draw every curve of a stage that is worth looking at, and that was measured."""
    bpb = {path[-1]: each.value for path, each in estimates({metrics.BPB: stage.evaluation.get(metrics.BPB)})}
    levels = {name: bpb[name] for name in ("unigram", "bigram") if finite(bpb.get(name)) is not None}
    passes = sorted({name for row in stage.rows for name in row if "pass@" in name}, key=lambda name: (len(name), name))
    loss = "Loss, which for rewards is no measure of progress" if stage.curve(REWARD)[0] else "Loss, nats per target"
    wanted: list[tuple[str, Sequence[str], Mapping[str, float]]] = [
        (loss, [LOSS, metrics.VAL_LOSS], {}),
        ("Bits per byte on held-out text, lower is better", [metrics.BPB], levels),
        ("Mean reward on training problems", [REWARD], {}),
        ("Right answers on held-out problems, as a share", passes, {}),
        ("Mean length of completions, tokens", [metrics.MEAN_LENGTH], {}),
        ("Prompts that teach nothing; answers cut off", [metrics.ZERO_STD, metrics.CLIPPED_RATIO], {}),
        ("Entropy where the model samples, nats", [metrics.ENTROPY], {}),
    ]
    plots = []
    for caption, names, lines in wanted:
        if curves := {name: curve for name in names if (curve := stage.curve(name))[0]}:
            slug = re.sub(r"\W+", "_", f"{stage.name}_{'_'.join(curves)}", flags=re.ASCII)[:80]
            plots.append(plot(slug, caption, curves, lines))
    return plots


def _comparison(stages: Sequence[Stage], wanted: Callable[[tuple[str, ...]], bool]) -> list[Table]:
    """Tabulate the estimates that are `wanted`: a table for each thing measured, a row an estimate, a column a stage."""
    found: dict[str, dict[tuple[str, ...], dict[str, Estimate]]] = {}
    for stage in stages:
        for path, estimate in estimates(stage.evaluation):
            if len(path) > 1 and wanted(path):
                found.setdefault(path[0], {}).setdefault(path[1:], {})[stage.name] = estimate
    tables = []
    for topic, rows in found.items():
        columns = [stage.name for stage in stages if any(stage.name in row for row in rows.values())]
        cells = [[" / ".join(path), *(str(row.get(name, "–")) for name in columns)] for path, row in rows.items()]
        header = [topic.replace("_", " "), *(f"after {name}" for name in columns)]
        tables.append(Table(header, [[cell.replace("_", " ") for cell in row] for row in cells]))
    return tables


def _text(value: object) -> str:
    """Return a setting, prompt or completion as text: a string as it is, messages as lines of `role: content`."""
    if isinstance(value, list):
        lines = [f"{m.get('role', '?')}: {m.get('content', '')}" for m in value if isinstance(m, dict)]
        return "\n".join(lines) or json.dumps(value, default=str)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _chats(stage: Stage) -> list[Chat]:
    """For each prompt sampled, its answer before the stage (the first step sampled) and after it (the last)."""
    prompts: dict[str, list[tuple[float, str]]] = {}
    for row in stage.samples:
        if "prompt" in row and "completion" in row:
            step = finite(row.get(metrics.STEP)) or 0.0
            prompts.setdefault(_text(row["prompt"]), []).append((step, _text(row["completion"])))
    chats = []
    for prompt, answers in list(prompts.items())[:SAMPLED_PROMPTS]:
        answers.sort(key=lambda answer: answer[0])
        ends = answers[:1] if answers[0][0] == answers[-1][0] else [answers[0], answers[-1]]
        chats.append(Chat(prompt, [(f"step {step:,.0f}", text) for step, text in ends]))
    return chats


def _overview(stages: Sequence[Stage]) -> Table:
    """Tabulate what each stage cost and how far its loss, or its reward, came."""
    rows = []
    for stage in stages:
        name = REWARD if stage.curve(REWARD)[0] else LOSS
        steps, values = stage.curve(name)
        ends = f"{name} {values[0]:.3g} → {sum(values[-10:]) / len(values[-10:]):.3g}" if values else "–"
        tokens = stage.last(metrics.TOKENS) or sum(stage.curve(metrics.STEP_TOKENS)[1]) or None
        counts = (steps[-1] if steps else None, tokens, stage.last(metrics.TOKENS_PER_SECOND))
        shown = ["–" if count is None else f"{count:,.0f}" for count in counts]
        rows.append([TITLES[stage.name], *shown, ends, "–" if stage.seconds is None else duration(stage.seconds)])
    return Table(["stage", "steps", "tokens", "tokens/s", "first step → last ten", "time"], rows)


def _headline(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """Tell the story in a few numbers: only those that were measured."""
    items = []
    for stage in stages:
        if bits := stage.curve(metrics.BPB)[1]:
            items.append((f"{bits[0]:.2f} → {bits[-1]:.2f}", f"bits per byte of held-out text, along {stage.name}"))
            break
    found = {(s.name, *path): each for s in stages for path, each in estimates(s.evaluation)}
    for topic, wanted in (("persona", ""), ("math", "pass@1")):
        keys = [key for key in found if key[1:2] == (topic,) and len(key) > 2 and wanted in key[-1]]
        same = [key for key in keys if key[1:] == keys[0][1:]]
        if same:
            name = " ".join(same[0][1:]).replace("_", " ")
            values = " → ".join(f"{found[key].value:.0%}" for key in same)
            items.append((values, f"{name}, after {' → '.join(key[0] for key in same)}"))
    return [*items, (duration(sum(stage.seconds or 0 for stage in stages)), "for all stages together")]


def sections(run: Path) -> list[Section]:
    """Return everything the report says of a run, in order; ValueError where the folder holds no stage."""
    if not any((run / name).is_dir() for name in TITLES):
        raise ValueError(f"--run {run}: no base/, sft/ or rl/ in it; name the folder of a run, such as runs/tiny")
    stages = [read_stage(run / name) for name in TITLES]
    tables = _comparison(stages, lambda path: not is_detail(path))
    kinds = _comparison(stages, lambda path: "sampled" in path and path[-2] in ("by_kind", "by_steps"))
    machines = [found for stage in stages if isinstance(found := stage.evaluation.get("environment"), dict)]
    machine = [[str(name), _text(value)] for name, value in (machines[-1:] or [{}])[0].items()]
    seen = {name for stage in stages for row in stage.rows for name in row}
    named = [[name, meaning] for name, meaning in metrics.DEFINITIONS.items() if name in seen]
    found = [Section("The run", facts=_headline(stages), tables=[_overview(stages)])]
    for stage in stages:
        plots = _plots(stage)
        notes = stage.notes or ([] if plots else ["Nothing was recorded."])
        found.append(Section(TITLES[stage.name], notes=notes, plots=plots))
    unmeasured = "No stage has been measured yet: an eval.json in its folder would show here."
    found.append(Section("What was measured", tables=tables, notes=[] if tables else [unmeasured]))
    found.append(Section("Problems by kind and by number of steps: share of samples that are right", tables=kinds))
    found.append(Section("All other figures", tables=_comparison(stages, is_detail), folded=True))
    found += [Section(f"{TITLES[stage.name]}: samples before and after", chats=_chats(stage)) for stage in stages]
    found.append(Section("Environment", tables=[Table(["of the run", ""], machine)] if machine else []))
    for stage in stages:
        settings = [[str(name), _text(value)] for name, value in stage.settings.items()]
        table = [Table(["setting", "value"], settings)] if settings else []
        found.append(Section(f"Settings of {stage.name}", tables=table, folded=True))
    found.append(Section("What the names mean", tables=[Table(["metric", "meaning"], named)], folded=True))
    return [each for each in found if each.facts or each.notes or each.tables or each.chats or each.plots]


def write_report(run: Path) -> Path:
    """Write report.html, report.md and its figures (report/*.svg) into the run's folder; return the page's path.

    Raises ValueError where `run` is not the folder of a run.
    """
    values = {
        "title": f"{run.resolve().name}: the life of a small chat model",
        "subtitle": f"Written {datetime.now():%Y-%m-%d %H:%M}. Square brackets hold 95% intervals.",
        "sections": sections(run),
    }
    (run / "report").mkdir(exist_ok=True)
    for figure in (figure for section in values["sections"] for figure in section.plots):
        (run / "report" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    for name in ("report.md", "report.html"):
        (run / name).write_text(render(f"{name}.jinja", **values), encoding="utf-8")
    return run / "report.html"
