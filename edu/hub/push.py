"""The Hub: the model card beside every checkpoint, and the push of a checkpoint. No torch."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from edu.config.metrics import BPB, LOSS, PASS_AT_1, REWARD, STEP, VAL_LOSS
from edu.data.atomic_io import write_text
from edu.data.hub_files import EVAL_RESULTS, HUGGING_FACE_FILES, check_token, hub_errors, is_hub_id
from edu.evaluation.estimates import estimates, is_detail
from edu.evaluation.rendering import render

_HERE = "path/to/this/folder"  # stands for the model's name in a card that is not pushed
_WORDS = {
    "base": "pretrained on text: it continues a text, it does not chat",
    "sft": "pretrained, then fine-tuned on conversations",
    "imported": "trained by nanochat; its logits are unchanged",
    "rl": "pretrained, fine-tuned on conversations, then trained by reinforcement learning on problems with checkable answers",
}
_NO_RECIPE = ("out", "keep", "save_every", "log_with", "push_to_hub", "hub_private")  # settings that change no result
_COURSE = (REWARD, PASS_AT_1, LOSS, VAL_LOSS, BPB)


@dataclass(frozen=True)
class Card:
    """Content of a model card."""

    stage: str = "base"
    """base, sft, rl, or imported."""
    step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The stage's configuration as plain values."""
    data: Sequence[tuple[str, str]] = ()
    """Training data: paths or Hub ids, and how much of each."""
    course: Sequence[Mapping[str, Any]] = ()
    """Rows of metrics.jsonl."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Measurements at the end: the tree of eval.json."""


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md` into a checkpoint's folder, and results on a benchmark of the Hub in the Hub's form; offline."""
    from huggingface_hub import ModelCard, ModelCardData

    start = str(card.settings.get("model", ""))
    metadata = ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["edu-chat", "nanochat", card.stage],
        datasets=list(dict.fromkeys(name for name, _ in card.data if is_hub_id(name))) or None,
        base_model=start if is_hub_id(start) else None,
    )
    data = [[_public(name), used] for name, used in card.data]
    recipe = [[name, _public(value)] for name, value in card.settings.items() if value is not None]
    figures = [
        [" / ".join(path), each] for path, each in estimates(card.figures) if len(path) > 1 and not is_detail(path)
    ]
    intervals = "Square brackets hold 95% intervals, n is the number of examples."
    tables = [
        ("Data", "", ["trained on", "how much"], data),
        ("Recipe", "", ["setting", "value"], [row for row in recipe if row[0] not in _NO_RECIPE]),
        ("Course of training", "Each value is the mean since the row above.", *_course(card.course)),
        ("Evaluation", intervals, ["metric", "value"], figures),
    ]
    values = {
        "metadata": metadata.to_yaml(),
        "model": _HERE,
        "description": _WORDS[card.stage],
        "sizes": _sizes(folder),
    }
    write_text(folder / "README.md", str(ModelCard(render("card.md.jinja", card=card, tables=tables, **values))))
    _write_eval_results(folder / EVAL_RESULTS, card)


def _sizes(folder: Path) -> str:
    """Describe how large the model in a folder is; "" before there is one."""
    from safetensors import safe_open

    if not (folder / "config.json").is_file():
        return ""
    config, count = json.loads((folder / "config.json").read_text()), 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "numpy") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return (
        f"{count:,} parameters in {config['num_hidden_layers']} layers of {config['hidden_size']:,} channels, "
        f"a vocabulary of {config['vocab_size']:,} tokens and a context of {config['max_position_embeddings']:,}"
    )


def _public(value: object) -> str:
    """Return a setting as text; of a path on this machine its last part only.

    >>> _public("/data/mine/chats.jsonl"), _public([0.5, "x"])
    ('chats.jsonl', '[0.5, "x"]')
    """
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return json.dumps(value, ensure_ascii=False, default=str)


def _course(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a table of the metrics over the steps: first step, ten spans, each by its last step, curves.

    >>> _course([{"step": 0, "bpb": 4}, {"step": 1, "loss": 6}, {"step": 2, "loss": 5, "bpb": 3}])[1]
    [['0', '', '4'], ['1', '6', ''], ['2', '5', '3'], ['curve', '█▁', '█▁']]
    """
    known = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
    # The loss of RL weighs log-probabilities by advantages: it says nothing about progress.
    names = [name for name in _COURSE if name in known and not (name == LOSS and REWARD in known)]
    last = max((int(row[STEP]) for row in rows), default=0)
    ends = sorted({last * i // 10 for i in range(11)})
    lines = []
    for before, end in zip([-1, *ends], ends, strict=False):
        span = [row for row in rows if before < row[STEP] <= end]
        found = [[row[name] for row in span if isinstance(row.get(name), int | float)] for name in names]
        if any(found):
            lines.append([f"{end:,}", *(f"{sum(values) / len(values):.4g}" if values else "" for values in found)])
    curves = [_curve([float(line[i]) for line in lines if line[i]]) for i in range(1, len(names) + 1)]
    return [STEP, *names], [*lines, ["curve", *curves]] if lines else []


def _curve(values: Sequence[float]) -> str:
    """Draw the values as bars, from the least to the greatest of them: `▁▂▃▄▅▆▇█`."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0), max(finite, default=0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] for value in finite)


def _write_eval_results(path: Path, card: Card) -> None:
    """Write GSM8K's accuracy for the model's page and the benchmark's own; only where its whole test split was measured."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from yaml import safe_dump

    found = dict(estimates(card.figures)).get(("math", "greedy", "accuracy"))
    whole = "problems" in card.settings and card.settings["problems"] is None and card.settings["eval_limit"] is None
    if found is None or not whole:
        return
    notes = f"zero-shot, greedy, with a calculator; {found} (95% interval)"
    value, today = round(100 * found.value, 2), date.today().isoformat()
    entry = EvalResultEntry(dataset_id="openai/gsm8k", task_id="gsm8k", value=value, date=today, notes=notes)
    path.parent.mkdir(exist_ok=True)
    write_text(path, safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a checkpoint's Hugging Face files as one commit, making the repository and branch if need be; gives its URL.

    1. The card's example names the repository, there and not here: nothing in the folder changes.
    2. Files of a checkpoint that was there before, and that this one does not have, go.

    Raises ValueError where the user must act, ConnectionError where pushing again may do.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise ValueError(f"--model {folder}: no config.json and model.safetensors in it; name a checkpoint's folder")
    if repo_id.count("/") != 1:
        raise ValueError(f"--repo {repo_id}: name the repository as user/name")
    check_token()
    api = HfApi()
    files = {
        path.relative_to(folder).as_posix(): path for pattern in HUGGING_FACE_FILES for path in folder.glob(pattern)
    }
    with hub_errors(f"--repo {repo_id}", may="write"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"--private: {repo_id} exists and is public; make it private in its settings, or name another"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = filter_repo_objects(
            api.list_repo_files(repo_id, revision=revision), allow_patterns=list(HUGGING_FACE_FILES)
        )
        operations: list[Any] = [CommitOperationDelete(name) for name in there if name not in files]
        for name, path in files.items():
            card = path.read_text(encoding="utf-8").replace(_HERE, repo_id).encode() if name == "README.md" else path
            operations.append(CommitOperationAdd(name, card))
        commit = api.create_commit(repo_id, operations, commit_message=f"Upload {folder.name}", revision=revision)
    return str(commit.commit_url)
