"""Chapter 3: device and distributed setup. Fill in the bodies; `make grade CHALLENGE=3` says what holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setup:
    """Where this process computes."""

    rank: int
    """Number of this process, 0 to world_size - 1."""
    world_size: int
    """Number of all processes."""
    device: torch.device


def autodetect_device_type() -> str:
    """Return the best device type at hand: "cuda", else "mps", else "cpu"."""
    raise NotImplementedError


def compute_init(seed: int, device_type: str | None = None) -> Setup:
    """Set up this process, and return where it computes; device_type None means autodetect.

    1. A launcher such as torchrun starts every process with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in
       its environment; without a launcher they are absent, and there is one process, rank 0.
    2. With more than one process, form a group: backend "nccl" on cuda, "gloo" elsewhere.
    3. On cuda each process takes the GPU of its LOCAL_RANK.
    4. Seed torch the same on every process: weights made here are equal everywhere.
    """
    raise NotImplementedError


def all_sum(value: float, setup: Setup) -> float:
    """Return the sum of a number over all processes; the number itself where there is one."""
    raise NotImplementedError


def compute_cleanup(setup: Setup) -> None:
    """Leave the group, if there is one, so that the processes end without a warning."""
    raise NotImplementedError
