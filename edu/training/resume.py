"""Check that a stage's folder was made with these settings, from these files. No torch here."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from edu.config.fields import flag
from edu.config.reading import read_yaml
from edu.config.stages import StageConfig, as_settings

FREE_ON_RESUME = {"out", "save_every", "keep", "eval_every", "micro_batch_size", "log_with", "compile", "eval_batches"}
FREE_ON_RESUME |= {"push_to_hub", "hub_private", "on_bad_shard"}
FREE_ON_RESUME |= {"identity", "persona", "facts", "eval_samples", "eval_limit", "eval_problems", "sample_prompts"}
"""Settings that may differ when a run is resumed: how it is saved, split and measured, not what it learns."""
INPUTS = {
    "data": ("*.parquet", "val/*.parquet"),
    "tokenizer": ("tokenizer.json",),
    "model": ("config.json", "model*.safetensors", "tokenizer.json"),
    "problems": ("*.jsonl",),
} | dict.fromkeys(("replay", "task", "reward", "persona", "identity", "facts"), ())
"""Settings that name what a stage is made from or measured on, and the files that count where they name a folder."""
RENAMED = {"recipes/tiny/replay.yaml": "recipes/tiny/mixture.yaml"}
"""Values in the settings of earlier versions, and what they are called now."""
BLOCK, BLOCKS = 1 << 16, 16


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a stage, oldest first. A folder of that name without `state/` is not one of ours."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted((p for p in found if (p / "state").is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def fingerprint(path: Path) -> str:
    """Return a hash of a file's size and content; of a large shard or weights file, of 16 blocks spread over it."""
    size, sampled = path.stat().st_size, path.suffix in (".parquet", ".safetensors")
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for at in range(0, size, max(BLOCK, size // BLOCKS) if sampled else BLOCK):
            file.seek(at)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def made_from(config: StageConfig) -> dict[str, str]:
    """Return the fingerprints of the local files that a stage is made from and measured on, by flag and file."""
    found = dict[str, str]()
    for name, patterns in INPUTS.items():
        if (value := getattr(config, name, None)) is None:
            continue
        place = Path(str(value).rpartition(":")[0] or value)  # a task or a reward is file.py:name
        paths = [place]
        if place.is_dir():
            paths = [p for pattern in patterns for p in place.glob(pattern)]
        elif place.suffix in (".yaml", ".yml") and place.is_file() and isinstance(entries := read_yaml(place), list):
            paths += [Path(str(entry["path"])) for entry in entries if isinstance(entry, dict) and entry.get("path")]
        for path in (path for path in paths if path.is_file()):
            found[f"{flag(name)} {path.relative_to(place) if place.is_dir() else path}"] = fingerprint(path)
    return found


def check_settings(config: StageConfig, before: Mapping[str, Any], whose: Path) -> None:
    """Raise if something was made with other settings than these."""
    before, now = (
        as_settings(type(config)(out=config.out)) | dict(before),
        as_settings(config),
    )  # what it lacks is newer
    before = {name: RENAMED.get(str(value), value) for name, value in before.items()}
    changed = [name for name in now if name not in FREE_ON_RESUME and before[name] != now[name]]
    if changed:
        what = ", ".join(f"{flag(name)} was {before[name]!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{whose} holds a run with other settings ({what}): give its own, or another --out")


def check_made_from(config: StageConfig, before: Mapping[str, str]) -> list[str]:
    """Raise if files that the stage learns from have changed; return those it is measured on that have."""
    now, known = made_from(config), {key.split()[0] for key in before}
    changed = sorted(key for key in now | dict(before) if key.split()[0] in known and now.get(key) != before.get(key))
    # The problems of SFT only measure it.
    names = FREE_ON_RESUME if hasattr(config, "reward") else FREE_ON_RESUME | {"problems", "task"}
    measured = [key for key in changed if key.split()[0] in map(flag, names)]
    if learnt := [key for key in changed if key not in measured]:
        out = quote(str(config.out))
        raise ValueError(
            f"{config.out} was made from something else: changed since are {', '.join(learnt)}. To make it again: "
            f"`mv {out} {out}.old` and the same command, or another --out; to keep it, put the old files back"
        )
    return measured


def check_resumable(config: StageConfig) -> None:
    """Raise if the stage's folder holds checkpoints made with other settings than these."""
    path = config.out / "config.yaml"
    if path.is_file() and checkpoints(config.out):
        before = read_yaml(path)
        if not isinstance(before, dict):
            raise ValueError(
                f"{path}: no settings in it; the file is damaged: delete it, the checkpoints know them too"
            )
        check_settings(config, before, config.out)
