"""My setup."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Setup:
    rank: int
    world_size: int
    device: torch.device


def autodetect_device_type():
    a = torch.accelerator.current_accelerator()
    return a.type if a else "cpu"


class Launcher:
    def __init__(self, env):
        self.rank = int(env.get("RANK", "0"))
        self.size = int(env.get("WORLD_SIZE", "1"))
        self.local = int(env.get("LOCAL_RANK", "0"))
        self.url = f"tcp://{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"


def compute_init(seed, device_type=None):
    me = Launcher(os.environ)
    kind = device_type or autodetect_device_type()
    if kind == "cuda":
        device = torch.device("cuda", me.local)
        torch.cuda.set_device(device)
    else:
        device = torch.device(kind)
    if me.size > 1:
        dist.init_process_group(
            backend="nccl" if kind == "cuda" else "gloo",
            init_method=me.url,
            rank=me.rank,
            world_size=me.size,
            timeout=timedelta(minutes=2),
        )
    torch.manual_seed(seed)
    return Setup(me.rank, me.size, device)


def all_sum(value, setup):
    if setup.world_size == 1:
        return value
    parts = [None] * setup.world_size
    dist.all_gather_object(parts, float(value))
    return sum(parts)


def compute_cleanup(setup):  # noqa: ARG001
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
