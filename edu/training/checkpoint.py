"""Checkpoints: complete or absent, verified when they are read, pruned to the newest few.

    runs/tiny/base/checkpoint-200/            a complete Hugging Face folder
    runs/tiny/base/checkpoint-200/state/      what resuming needs: trainer.json, optimizer.pt; files.json lists all files
    runs/tiny/base/model.safetensors, ...     hard links to the newest checkpoint's files: from_pretrained works

There is no state of random generators to keep: every draw of a run is a function of its seed and the step.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from edu.config.reading import read_json
from edu.config.stages import StageConfig
from edu.data.atomic_io import sync, write_text
from edu.model.load import load_model
from edu.training.resume import check_made_from, check_settings, checkpoints, step_of


class Damaged(ValueError):
    """A checkpoint that cannot be read, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read."""

    path: Path
    trainer: dict[str, Any]
    """trainer.json: stage, step, tokens, settings, inputs, environment, and each process's position in the data."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    """State of the optimizer and of fp16's gradient scaler."""

    @property
    def step(self) -> int:
        """Steps taken before it was written."""
        return self.trainer["step"]


def read(path: Path, device: torch.device | str = "cpu", *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint after comparing all its files with their checksums; Damaged says what is wrong with which file.

    Checkpoints of earlier versions list sizes instead of checksums.
    """
    name = "state/files.json"
    try:
        listed = read_json(path / name)
        for name, expected in listed.items() if verify else ():
            found = (path / name).stat().st_size if isinstance(expected, int) else _sha256(path / name)
            if found != expected:
                raise ValueError("its content has changed")
        name = "state/trainer.json"
        trainer = read_json(path / name)
        if trainer["step"] != step_of(path):
            raise ValueError(f"it says step {trainer['step']}")
        name = "state/optimizer.pt"
        optimizer = torch.load(path / name, map_location=device, weights_only=True)
        name = "model.safetensors"
        weights = load_model(str(path)).state_dict()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(f"{path}: {name} is damaged ({why})") from None
    return Checkpoint(path, trainer, weights, optimizer)


def read_newest(folder: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """Read the newest checkpoint that is whole. Damaged ones are named and moved aside: nothing is deleted.

    ValueError if there are checkpoints, and none can be read.
    """
    damaged: dict[Path, Damaged] = {}
    for path in reversed(checkpoints(folder)):
        try:
            checkpoint = read(path, device)
        except Damaged as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            aside = next(p for i in range(1, 1000) if not (p := folder / f"{other.name}.damaged-{i}").exists())
            other.rename(aside)
            print(f"{error}; going back to step {step_of(path)}. It is kept as {aside.name}", flush=True)
        return checkpoint
    if damaged:
        said = "; ".join(map(str, damaged.values()))
        raise ValueError(f"no checkpoint can be read: {said}. To start anew move {folder} away, or give another --out")
    return None


def check(checkpoint: Checkpoint, config: StageConfig, stage: str, environment: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint is of this stage, of these settings, inputs and precision; say where it was made otherwise."""
    path, trainer, before = checkpoint.path, checkpoint.trainer, checkpoint.trainer.get("environment", {})
    if trainer.get("stage") != stage:
        raise ValueError(
            f"{path}: a checkpoint of {trainer.get('stage')}, not of {stage}; move it away, or give another --out"
        )
    check_settings(config, trainer.get("settings", {}), path)
    if checkpoint.step > config.max_steps:
        raise ValueError(f"{path}: beyond --max-steps {config.max_steps}; give more, or another --out")
    check_made_from(config, trainer.get("made_from", {}))
    precision = environment["mixed_precision"]
    if (was := before.get("mixed_precision", precision)) != precision:
        raise ValueError(f"{path}: trained with --mixed-precision {was}, now {precision}; give {was}, or another --out")
    for name in ("device", "threads", "torch", "fast"):
        was, now = (str(found.get(name)).partition(":")[0] for found in (before, environment))
        if name in before and was != now:
            said = f"{path}: made with {name} {was}, continued with {now}: the last bits of results may differ"
            print(said + ("; EDU_FAST=1 or 0 chooses" if name == "fast" else ""), flush=True)


def write(target: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a checkpoint under a temporary name, list the checksums, flush all to disk, rename.

    OSError says that the disk is full or what else prevents it; then nothing is left behind.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    try:
        if target.exists():
            raise OSError("something else has this name; move it away")
        fill(temporary)
        follow_umask(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        listed = {path.relative_to(temporary).as_posix(): _sha256(path) for path in files}
        write_text(temporary / "state" / "files.json", json.dumps(listed, indent=1))
        for path in (*files, temporary / "state", temporary):
            sync(path)
        temporary.rename(target)
        sync(target.parent)
    except (SafetensorError, RuntimeError, OSError) as error:  # what libraries raise where the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        free = f"{shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB are free there"
        kept = f"the checkpoints before step {step_of(target)} are whole, and the same command continues from there"
        raise OSError(f"{target}: cannot be written ({error}); {free}; {kept}") from error


def publish(newest: Path, keep: int) -> None:
    """Make the stage's folder show a checkpoint's Hugging Face files, and drop the checkpoints before the last `keep`."""
    names = [path.name for path in newest.iterdir() if path.is_file()]
    for name in sorted(names, key=lambda name: name.endswith(".safetensors")):  # a reader never sees settings alone
        _replace_by_link(newest / name, newest.parent / name)
    for old in checkpoints(newest.parent)[:-keep]:
        remove(old)


def remove(path: Path) -> None:
    """Delete the files that a checkpoint lists as its own; what a user put beside them stays."""
    listed = path / "state" / "files.json"
    try:
        ours = {*read_json(listed), "state/files.json"}
    except ValueError:
        ours = set()
    if not {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - ours:
        temporary = path.with_name(f".{path.name}.tmp")  # a kill leaves what the next start clears away
        path.rename(temporary)
        shutil.rmtree(temporary)
        return
    for name in sorted(ours, key=lambda name: name == "state/files.json"):
        (path / name).unlink(missing_ok=True)
    if not any((path / "state").iterdir()):
        (path / "state").rmdir()


def follow_umask(folder: Path) -> None:
    """Give all files of a folder the permissions of a new file; safetensors makes its own readable by their owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_by_link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one atomic step; a copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    if target.exists() and target.samefile(source):
        return  # renaming one link of a file to another does nothing, and leaves both
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
