"""The folder of a stage while it is trained in: its lock, settings, and one line of metrics a step."""

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout

from edu.config.metrics import LOSS, SECONDS, STEP
from edu.config.stages import StageConfig, as_settings
from edu.data.atomic_io import sync, write_text
from edu.data.metrics_log import MetricsLog, read_metrics
from edu.training.resume import check_resumable, checkpoints


class Run:
    """A stage's folder, owned until the run ends. All processes make one; the main one writes.

    config.yaml has the settings, metrics.jsonl a line a step, samples.jsonl what the model says at an evaluation.
    """

    def __init__(self, config: StageConfig, stage: str, accelerator: Accelerator) -> None:
        self.config, self.stage, self.accelerator, self.folder = config, stage, accelerator, config.out
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The operating system's lock: it goes when the process does, however it ends.
            self._lock = FileLock(self.folder / ".lock", fallback_to_soft=False)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"{self.folder}: another run is writing here; wait for it, or give another --out"
                ) from None
            check_resumable(config)
            for name in ("config.yaml", "metrics.jsonl") if checkpoints(self.folder) else ():
                if not (self.folder / name).is_file():
                    lost = "the checkpoint's own count" if name == "config.yaml" else "its curves begin anew"
                    print(f"{self.folder / name} is missing: {lost}", flush=True)
            write_text(self.folder / "config.yaml", yaml.safe_dump(as_settings(config), sort_keys=False))
            self.metrics = MetricsLog(self.folder / "metrics.jsonl")
            self.samples = MetricsLog(self.folder / "samples.jsonl")
        accelerator.wait_for_everyone()
        if config.log_with is not None:
            settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in as_settings(config).items()}
            name = {"name": str(self.folder)}
            own = {"trackio": name | {"resume": "allow" if checkpoints(self.folder) else "never"}}
            accelerator.init_trackers("edu", settings, own | {"wandb": name | {"dir": str(self.folder)}})

    def rewind(self, step: int) -> None:
        """Drop what a kill left behind a step: temporary checkpoints, and rows of later steps.

        An evaluation follows its checkpoint and is done again; the rows of the steps up to it stay as they are.
        """
        for path in self.folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(path)
        self.metrics.keep(lambda row: row[STEP] < step or (row[STEP] == step and LOSS in row))
        self.samples.keep(lambda row: row[STEP] < step)

    def seconds(self) -> float:
        """Return the seconds of training that the metrics hold already."""
        return max((row.get(SECONDS) or 0.0 for row in self.rows()), default=0.0)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, and tell the trackers."""
        if self.accelerator.is_main_process:
            self.metrics.write(step, values)
        if self.config.log_with is not None:
            self.accelerator.log(dict(values), step=step)

    def show(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Write lines of samples.jsonl: what the model says at this step."""
        if self.accelerator.is_main_process:
            for row in rows:
                self.samples.write(step, row)

    def sync(self) -> None:
        """Flush the logs to disk: a power failure must not take rows of steps whose checkpoint is kept."""
        for log in (self.metrics, self.samples):
            sync(log.path)

    def close(self) -> None:
        """Let go of the folder."""
        if self.accelerator.is_main_process:
            self.metrics.close()
            self.samples.close()
            self._lock.release()
