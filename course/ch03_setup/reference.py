"""edu's setup, which lets accelerate do it, under the names of chapter 3."""

import os
from dataclasses import dataclass
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from edu.training import accelerator as training
from edu.training.accelerator import autodetect_device_type

UNTESTABLE = {"local_gpu": "accelerate opens the GPU itself, and here is none"}

__all__ = ["Setup", "all_sum", "autodetect_device_type", "compute_cleanup", "compute_init"]


@dataclass(frozen=True)
class Setup:
    rank: int
    world_size: int
    device: torch.device


def compute_init(seed: int, device_type: str | None = None) -> Setup:
    """Set up through accelerate, whose state is kept for the whole process and forgotten here."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    told = {"ACCELERATE_USE_CPU": "true"} if device_type == "cpu" else {}
    with patch.dict(os.environ, told):
        found = training.compute_init(seed)
    return Setup(found.process_index, found.num_processes, found.device)


def all_sum(value: float, setup: Setup) -> float:
    total = torch.tensor(value, device=setup.device)
    if setup.world_size > 1:
        torch.distributed.all_reduce(total)
    return total.item()


def compute_cleanup(setup: Setup) -> None:
    if setup.world_size > 1:
        torch.distributed.destroy_process_group()
