"""The folder of a run: settings, metrics, checkpoints that are complete or absent, and the model at its newest.

    runs/tiny/base/config.yaml, metrics.jsonl       the settings; one line a step
    runs/tiny/base/checkpoint-200/                  a complete Hugging Face folder, and state/ for resuming
    runs/tiny/base/model.safetensors, ...           hard links to the newest checkpoint's files: from_pretrained works

There is no state of random generators to keep: every draw of a run is a function of its seed and the step.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from edu.config.metrics import LOSS, SECONDS, STEP
from edu.config.stages import StageConfig, as_settings
from edu.data.atomic_io import sync, write_text
from edu.data.hub_files import check_token
from edu.data.metrics_log import MetricsLog, read_metrics
from edu.data.tokenizer import Tokenizer
from edu.hub.push import Card, push, write_card
from edu.model.gpt import GPT
from edu.model.load import load_model, quiet_transformers
from edu.training.accelerator import describe
from edu.training.optimizer import MuonAdamW, sharded_as
from edu.training.resume import check_resumable, push_advice


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files have the sizes that were written; says which ones it passes over."""
    for path in reversed(checkpoints(folder)):
        listed = path / "state" / "files.json"
        sizes: Mapping[str, int] = json.loads(listed.read_text()) if listed.is_file() else {"state/files.json": -1}
        broken = [
            name for name, size in sizes.items() if not (path / name).is_file() or (path / name).stat().st_size != size
        ]
        if not broken:
            return path
        print(f"{path}: {', '.join(broken)} is damaged; going back to the checkpoint before", flush=True)
    return None


class Run:
    """One stage of a run: opens its folder, resumes, logs, saves. All processes make one; the main one writes."""

    def __init__(
        self,
        config: StageConfig,
        stage: str,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        data: Sequence[tuple[str, str]],
    ) -> None:
        """`data`, for the model card: paths or Hub ids, and how much of each is trained on."""
        self.config, self.stage, self.accelerator, self.tokenizer = config, stage, accelerator, tokenizer
        self.folder, self.data = config.out, data
        quiet_transformers()
        if accelerator.is_main_process:
            if config.push_to_hub is not None:
                check_token()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            check_resumable(config)
            write_text(self.folder / "config.yaml", yaml.safe_dump(as_settings(config), sort_keys=False))
            self.metrics = MetricsLog(self.folder / "metrics.jsonl")
            self.samples = MetricsLog(self.folder / "samples.jsonl")
        accelerator.wait_for_everyone()
        if config.log_with is not None:
            settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in as_settings(config).items()}
            name = {"name": str(self.folder)}
            own = {"trackio": name | {"resume": "allow" if checkpoints(self.folder) else "never"}}
            accelerator.init_trackers("edu", settings, own | {"wandb": name | {"dir": str(self.folder)}})

    def resume(self, model: nn.Module, optimizer: MuonAdamW, stream: Any = None) -> tuple[int, int]:
        """Load the newest intact checkpoint; return its step and the tokens trained on, or (0, 0) without one.

        What a kill left half done is put right: damaged and temporary checkpoints go, the folder's links are renewed.
        """
        newest = newest_intact(self.folder)
        step, tokens = 0, 0
        if newest is not None:
            state = json.loads((newest / "state" / "trainer.json").read_text())
            step, tokens, positions = state["step"], state["tokens"], state["data"]
            if stream is not None:
                if len(positions) != (world := self.accelerator.num_processes):
                    self.close()
                    was = f"{self.folder} was trained by {len(positions)} processes"
                    raise ValueError(f"{was}: resume with as many, not {world}")
                stream.load_state_dict(positions[self.accelerator.process_index])
            inner, weights = self.accelerator.unwrap_model(model), load_model(str(newest)).state_dict()
            inner.load_state_dict({name: sharded_as(weights[name], p) for name, p in inner.state_dict().items()})
            path = newest / "state" / "optimizer.pt"
            device = self.accelerator.device
            where = "cpu" if device.type == "cpu" else device  # accelerate may say cpu:0, which torch cannot load to
            saved = torch.load(path, map_location=where, weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            if self.accelerator.scaler is not None and saved["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self.accelerator.print(f"{self.stage}: resuming after step {step} from {newest}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in [*self.folder.glob(".checkpoint-*.tmp"), *checkpoints(self.folder)]:
                if path.name.startswith(".") or int(path.name.removeprefix("checkpoint-")) > step:
                    shutil.rmtree(path)
            if newest is not None:
                self._publish(newest)
            # An evaluation follows its checkpoint and is done again; the steps up to the checkpoint stay as they are.
            self.metrics.keep(lambda row: row[STEP] < step or (row[STEP] == step and LOSS in row))
            self.samples.keep(lambda row: row[STEP] < step)
        return step, tokens

    def seconds(self) -> float:
        """Seconds of training that the metrics hold already."""
        return max((row.get(SECONDS) or 0.0 for row in read_metrics(self.folder / "metrics.jsonl")), default=0.0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the trackers."""
        if self.accelerator.is_main_process:
            self.metrics.write(step, values)
        if self.config.log_with is not None:
            self.accelerator.log(dict(values), step=step)

    def show(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Lines of samples.jsonl: what the model says at this step."""
        if self.accelerator.is_main_process:
            for row in rows:
                self.samples.write(step, row)

    def save(self, step: int, tokens: int, model: nn.Module, optimizer: MuonAdamW, stream: Any = None) -> None:
        """Write checkpoint-<step> under a temporary name, sync, rename; refresh the stage's folder; prune.

        Each process's position in `stream` is gathered. All processes must call this.
        """
        from accelerate.utils import gather_object

        positions = gather_object([None if stream is None else stream.state_dict()])
        weights, learning = self.accelerator.get_state_dict(model), optimizer.state_dict()
        target = self.folder / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            temporary = self.folder / f".checkpoint-{step}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True)
            unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            assert isinstance(unwrapped, GPT)
            scaler = self.accelerator.scaler
            inner = {"optimizer": learning, "scaler": None if scaler is None else scaler.state_dict()}
            state = {
                "stage": self.stage,
                "step": step,
                "settings": as_settings(self.config),
                "data": positions,
                "tokens": tokens,
                "environment": describe(self.accelerator),
            }
            try:
                unwrapped.save_pretrained(temporary, state_dict=weights)
                self.tokenizer.save(temporary, model_max_length=unwrapped.config.max_position_embeddings)
                self._card(temporary, step, {})
                torch.save(inner, temporary / "state" / "optimizer.pt")
                write_text(temporary / "state" / "trainer.json", json.dumps(state, default=str))
                for log in (self.metrics, self.samples):  # a power failure must not take rows of steps that are kept
                    sync(log.path)
                _seal(temporary, target)
            except (SafetensorError, RuntimeError, OSError) as error:  # what libraries raise where the disk is full
                shutil.rmtree(temporary, ignore_errors=True)
                free = f"{shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB are free there"
                kept = f"the checkpoints before step {step} are whole, and the same command continues from there"
                raise OSError(f"{target}: cannot be written ({error}); {free}; {kept}") from error
            self._publish(target)
        self.accelerator.wait_for_everyone()

    def _publish(self, newest: Path) -> None:
        """Make the stage's folder show the newest checkpoint, and drop the oldest ones."""
        for name in _hugging_face_files(newest):
            _replace_by_link(newest / name, self.folder / name)
        for old in checkpoints(self.folder)[: -self.config.keep]:
            shutil.rmtree(old)

    def _card(self, folder: Path, step: int, figures: Mapping[str, Any]) -> None:
        course = read_metrics(self.folder / "metrics.jsonl")
        write_card(folder, Card(self.stage, step, as_settings(self.config), self.data, course, figures))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write eval.json, the last output of a stage: with it the stage is finished. Refresh the card with it, and push.

        A push that fails is said, with the command that does it again, and costs the run nothing.
        """
        if self.accelerator.is_main_process:
            self._card(self.folder, self.config.max_steps, results)
            write_text(self.folder / "eval.json", json.dumps({"stage": self.stage, **results}, indent=1))
        self.accelerator.wait_for_everyone()
        self.close()
        self.accelerator.end_training()
        if self.accelerator.is_main_process and self.config.push_to_hub is not None:
            try:
                print(f"pushed: {push(self.folder, self.config.push_to_hub, self.config.hub_private)}", flush=True)
            except (ValueError, OSError) as error:
                print(
                    f"{self.folder}: finished and saved, but not pushed: {error}{push_advice(self.config)}",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Let go of the folder."""
        if self.accelerator.is_main_process:
            self.metrics.close()
            self.samples.close()
            self._lock.close()


def _lock(folder: Path) -> Any:
    """Own the folder until this process ends, however it ends."""
    handle = (folder / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ValueError(f"{folder}: another run is writing here; wait for it, or give another --out") from None
    return handle


def _seal(temporary: Path, target: Path) -> None:
    """List the files' sizes, flush everything to disk, and give the folder its name."""
    files = [path for path in temporary.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    (temporary / "state" / "files.json").write_text(json.dumps(sizes))
    for path in (*files, temporary / "state" / "files.json", temporary / "state", temporary):
        sync(path)
    temporary.rename(target)
    sync(target.parent)


def _hugging_face_files(folder: Path) -> list[str]:
    """Names of a checkpoint's files outside state/, weights last: a reader of the folder never sees new settings, no weights."""
    return sorted(
        (path.name for path in folder.iterdir() if path.is_file()), key=lambda name: name.endswith(".safetensors")
    )


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
