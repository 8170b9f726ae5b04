"""Device, processes, precision, signals. Everything goes through accelerate's Accelerator."""

import importlib.util
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from edu.model.linear import product

PRECISIONS = ("auto", "no", "bf16", "fp16")


def autodetect_device_type() -> str:
    """The best device type at hand: "cuda", "mps" or "cpu"; ACCELERATE_USE_CPU=true always means "cpu"."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(
    seed: int = 0, mixed_precision: str = "auto", log_with: str | None = None, out: str = "."
) -> Accelerator:
    """Set up device, process group, precision and seeds, and return the Accelerator that holds them.

    1. Without an accelerator device the processes form a gloo group; accelerate alone would start separate runs.
    2. A launcher's torch.compile, DeepSpeed, FSDP 1 and fp8 are refused by name, never dropped in silence.
    3. A launcher that promised several processes and gave one is an error: all would write the same files.
    """
    device_type = autodetect_device_type()
    mixed_precision = choose_precision(mixed_precision, device_type)
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"--log-with {log_with}: not installed; try `pip install -e '.[track]'`")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError("DeepSpeed's ZeRO flattens the weights, and Muon needs matrices: shard by fsdp2.yaml instead")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):  # accelerate would wrap the model, and rename its weights in every checkpoint
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend} (dynamo_backend of the launcher's settings): give the script --compile, "
            "and the launcher --dynamo_backend no"
        )
    sharding = _sharding(mixed_precision) if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None
    accelerator = Accelerator(
        cpu=device_type == "cpu",
        fsdp_plugin=sharding,
        mixed_precision=mixed_precision,
        dynamo_backend="no",
        log_with=log_with,
        project_dir=out,
        # The step counts its own micro-batches (see edu.training.step); accelerate must not guess from a data loader's end.
        # Sharded gradients are exchanged after each micro-batch: until then every process would hold them whole.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False, sync_each_batch=sharding is not None
        ),
        # The main process evaluates while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=4))],
    )
    check_world_size(accelerator.num_processes)
    if sharding is not None and accelerator.distributed_type == DistributedType.NO:
        raise ValueError("FSDP shards the model over processes, and there is one: give --num_processes, or cpu.yaml")
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards only where processes sit on accelerators; elsewhere it would train as DDP without a word
        accelerator.state.fsdp_plugin = sharding
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
    set_seed(seed)
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    return accelerator


def choose_precision(asked: str, device_type: str) -> str:
    """Return "no" (fp32), "bf16" or "fp16": the precision of products; weights and optimizer state are always fp32.

    "auto" is the launcher's bf16 or fp16, else bf16 where CUDA has it, else fp32. A launcher's "no" is also its default
    and does not count: for fp32 on a GPU say --mixed-precision no.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    name = f"--mixed-precision {asked!r}"
    if asked == "auto":
        has_bf16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        asked = launcher if launcher != "no" else "bf16" if has_bf16 else "no"
        name = f"ACCELERATE_MIXED_PRECISION={launcher} (mixed_precision of the launcher's settings)"
    if asked not in PRECISIONS[1:]:
        raise ValueError(f"{name}: choose one of {', '.join(PRECISIONS)}")
    if asked == "fp16" and device_type == "cpu":
        raise ValueError(f"{name}: fp16 needs a GPU, a CPU would compute in fp32; say --mixed-precision no or bf16")
    return asked


def _sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """accelerate's FSDP2: blocks are gathered and computed in the precision, gradients are summed in fp32 as elsewhere.

    The rest is as the launcher says, but that every process reads the weights: rollouts need a reference on each.
    """
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP 1 flattens the weights, and Muon needs matrices: say fsdp_version: 2 under fsdp_config")
    if os.environ.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise ValueError("weights in CPU memory were never tried: say fsdp_offload_params: false under fsdp_config")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy, cpu_ram_efficient_loading=False)


def check_world_size(num_processes: int) -> None:
    """Raise if a launcher started more processes than have found each other."""
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised != num_processes:
        raise ValueError(
            f"WORLD_SIZE={promised}, but this process sees {num_processes}: every process would believe to be alone. "
            "On a CPU launch with `torchrun --nproc_per_node 2` or accelerate_configs/cpu_2proc.yaml"
        )


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what a run's figures depend on, for people and for the report: processes, precision, machine, versions."""
    device, cpuinfo = accelerator.device, Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    found = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "device": str(device),
        "mixed_precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "distributed_type": accelerator.distributed_type.value,
        "python": platform.python_version(),
    }
    found |= {package: version(package) for package in ("torch", "accelerate", "transformers", "tokenizers", "numpy")}
    return found | {
        "CPU": named.group(1).strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "platform": platform.platform(),
    }


PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "T4": 65e12, "V100": 125e12}
PEAK_FLOPS |= {"RTX 4090": 165e12, "RTX 3090": 71e12}
"""Dense bf16 products (T4, V100: fp16) a second, by what a GPU's name holds, the narrower names first; makers' data sheets."""


def known_peak(gpu: str) -> float | None:
    """
    >>> known_peak("NVIDIA H100 80GB HBM3"), known_peak("NVIDIA A100-SXM4-40GB"), known_peak("NVIDIA A10G")
    (989000000000000.0, 312000000000000.0, None)
    """
    words = f" {gpu.replace('-', ' ')} "
    return next((flops for part, flops in PEAK_FLOPS.items() if f" {part} " in words), None)


@cache
def peak_flops(device_type: str) -> float:
    """FLOPs a second that one process can reach at best: a known GPU's data sheet, else what is measured.

    Measured: the best of five products of two square matrices; in fp32 on a CPU, with this process's threads.
    """
    if device_type == "cuda" and (known := known_peak(torch.cuda.get_device_name())):
        return known
    size, dtype = (1024, torch.float32) if device_type == "cpu" else (8192, torch.bfloat16)
    matrix, best = torch.ones(size, size, dtype=dtype, device=device_type), math.inf
    for _ in range(5):
        started = time.perf_counter()
        product(matrix, matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory(device_type: str) -> int:
    """Return the most bytes held so far: on the GPU by tensors, else by the whole process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopped(BaseException):
    """A signal came where nothing can be lost."""


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that a loop ends its step, saves and leaves; a second one, later, interrupts."""

    def __init__(self) -> None:
        self.noted: float | None = None
        self._breakable = False

    def __bool__(self) -> bool:
        return self.noted is not None

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if self.noted is None:
            self.noted = time.monotonic()
            if self._breakable:
                raise Stopped
        elif time.monotonic() - self.noted > 2:  # a launcher passes the terminal's Ctrl-C on once more
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Leave the block at once when a signal comes."""
        self._breakable = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self._breakable = False
