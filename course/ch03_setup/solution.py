"""The plain solution of chapter 3: device, process group, seeds."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Setup:
    rank: int
    world_size: int
    device: torch.device


def autodetect_device_type() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(seed: int, device_type: str | None = None) -> Setup:
    kind = device_type or autodetect_device_type()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    torch.manual_seed(seed)
    return Setup(rank, world_size, device)


def all_sum(value: float, setup: Setup) -> float:
    if setup.world_size == 1:
        return value
    total = torch.tensor(value, device=setup.device)
    dist.all_reduce(total)
    return total.item()


def compute_cleanup(setup: Setup) -> None:
    if setup.world_size > 1:
        dist.destroy_process_group()
