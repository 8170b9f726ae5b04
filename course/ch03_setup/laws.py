"""The laws of chapter 3, and the mistakes that they must name."""

import inspect
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from course.grading import ROOT, Mutant

TITLE = "device and distributed setup"
PROVIDES = ("Setup", "autodetect_device_type", "compute_init", "all_sum", "compute_cleanup")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WORKER = """
import importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("worker_module", sys.argv[1])
m = importlib.util.module_from_spec(spec)
sys.modules["worker_module"] = m
spec.loader.exec_module(m)
setup = m.compute_init(7, "cpu")
first = torch.rand(3).tolist()
total = m.all_sum(float(setup.rank + 1), setup)
grouped = torch.distributed.is_initialized()
m.compute_cleanup(setup)
print("RESULT", json.dumps([setup.rank, setup.world_size, str(setup.device), first, total, grouped, torch.distributed.is_initialized()]))
"""


@contextmanager
def _machine(cuda: bool = False, mps: bool = False, **environment: str) -> Iterator[None]:
    """A machine with these devices, and a launcher's environment or none."""
    kind = "cuda" if cuda else "mps" if mps else None
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    with (
        patch.dict(os.environ, {**kept, **environment}, clear=True),
        patch("torch.cuda.is_available", lambda: cuda),
        patch("torch.cuda.device_count", lambda: 8 if cuda else 0),
        patch("torch.backends.mps.is_available", lambda: mps),
        patch("torch.accelerator.is_available", lambda: kind is not None),
        patch("torch.accelerator.current_accelerator", lambda *_, **__: kind and torch.device(kind)),
    ):
        yield


def _run(m: Any, world_size: int) -> list[list[Any]]:
    """Start processes as a launcher does; what each found. The same file is run once, whatever the number of laws."""
    path = Path(inspect.getsourcefile(m.compute_init) or "")
    return _run_file(path, path.stat().st_mtime_ns, world_size)


@cache
def _run_file(path: Path, _: int, world_size: int) -> list[list[Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    started = []
    for rank in range(world_size):
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        launched = environment | ({name: str(value) for name, value in told.items()} if world_size > 1 else {})
        command = [sys.executable, "-c", WORKER, str(path)]
        started.append(
            subprocess.Popen(command, env=launched, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    deadline = time.monotonic() + 60
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if any(process.poll() for process in started):  # one failed: the others may wait for it for ever
            break
        time.sleep(0.05)
    late = [rank for rank, process in enumerate(started) if process.poll() is None]
    broken = [rank for rank, process in enumerate(started) if process.poll()]
    for process in started:
        process.kill()
    outputs = [process.communicate() for process in started]
    if any("NotImplementedError" in err for _, err in outputs):
        raise NotImplementedError
    for rank in broken:
        last = outputs[rank][1].strip().splitlines()[-1:] or ["no message"]
        raise AssertionError(f"process {rank} of {world_size} failed: {last[0]}")
    assert not late, f"processes {late} of {world_size} were not done after 60 s: does one wait for the others?"
    lines = [[line for line in out.splitlines() if line.startswith("RESULT ")] for out, _ in outputs]
    assert all(lines), f"process {[bool(each) for each in lines].index(False)} of {world_size} ended without a result"
    return [json.loads(each[0].removeprefix("RESULT ")) for each in lines]


def law_device_order(m: Any) -> None:
    """The best device at hand is taken: cuda before mps before cpu."""
    for cuda, mps, expected in (
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ):
        with _machine(cuda, mps):
            found = m.autodetect_device_type()
        assert isinstance(found, str), (
            f"a {type(found).__name__} came back; a torch.device never equals a string: return the type's name"
        )
        assert found == expected, f"cuda available: {cuda}, mps available: {mps}: {found!r}, expected {expected!r}"


def law_alone(m: Any) -> None:
    """Without a launcher there is one process, rank 0, and no group is formed."""
    with _machine():
        setup = m.compute_init(0)
        formed = torch.distributed.is_initialized()
        m.compute_cleanup(setup)
    assert (setup.rank, setup.world_size) == (0, 1), f"rank {setup.rank} of {setup.world_size}, expected 0 of 1"
    assert setup.device == torch.device("cpu"), f"no accelerator at hand, and the device is {setup.device!r}"
    assert not formed, "a group of one process was formed; without a launcher there is nobody to talk to"


def law_device_given(m: Any) -> None:
    """A device type that is given is used, whatever else is at hand."""
    with _machine(mps=True):
        setup = m.compute_init(0, "cpu")
    assert setup.device == torch.device("cpu"), f"device_type='cpu' was given, and the device is {setup.device!r}"


def law_seed(m: Any) -> None:
    """The same seed gives the same random numbers, another seed others."""
    drawn = []
    for seed in (3, 3, 4):
        with _machine():
            m.compute_init(seed)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]), "seed 3 twice, and other random numbers the second time: is torch seeded?"
    assert not torch.equal(drawn[0], drawn[2]), "seeds 3 and 4 gave the same random numbers: is the seed used?"


def law_local_gpu(m: Any) -> None:
    """On cuda a process takes the GPU of its LOCAL_RANK, and the group speaks nccl."""
    chosen: list[Any] = []
    groups: list[Any] = []
    with (
        _machine(cuda=True, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
        patch(
            "torch.cuda.set_device",
            lambda device: chosen.append(
                torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
            ),
        ),
        patch("torch.distributed.init_process_group", lambda *args, **kwargs: groups.append([*args, *kwargs.values()])),
        patch("torch.cuda.manual_seed_all", lambda _: None),
    ):
        setup = m.compute_init(0)
    assert (setup.rank, setup.world_size) == (5, 8), (
        f"RANK=5 WORLD_SIZE=8, and the setup says {setup.rank} of {setup.world_size}"
    )
    assert setup.device == torch.device("cuda", 1), (
        f"LOCAL_RANK=1, and the device is {setup.device!r}: on the second node rank 5 is GPU 1 of its machine, not GPU 5"
    )
    assert chosen == [torch.device("cuda", 1)], (
        f"torch.cuda.set_device was called with {chosen}, expected cuda:1, or all processes share a GPU"
    )
    assert len(groups) == 1, f"init_process_group was called {len(groups)} times, expected once"
    assert any("nccl" in str(value) for value in groups[0]), f"on GPUs the group speaks {groups[0]}, expected nccl"


def law_world(m: Any) -> None:
    """Two processes started by a launcher find each other, and each knows its number."""
    found = _run(m, 2)
    ranks = [(each[0], each[1]) for each in found]
    assert ranks == [(0, 2), (1, 2)], f"(rank, world size) of the two processes: {ranks}, expected (0, 2) and (1, 2)"
    assert all(each[5] for each in found), (
        "no group was formed: each process would train alone, and write the same files"
    )


def law_sum(m: Any) -> None:
    """A sum over two processes adds both parts, and both know it; alone it is the number itself."""
    totals = [each[4] for each in _run(m, 2)]
    assert totals == [3.0, 3.0], f"the processes brought 1 and 2; all_sum gave {totals}, expected 3.0 for both"
    (alone,) = _run(m, 1)
    assert alone[4] == 1.0, f"one process brought 1; all_sum gave {alone[4]}"


def law_equal_start(m: Any) -> None:
    """Both processes draw the same first random numbers, so that their weights start equal."""
    first, second = (each[3] for each in _run(m, 2))
    assert first == second, f"process 0 draws {first}, process 1 {second}: seeded by rank, models would start apart"


def law_cleanup(m: Any) -> None:
    """After the cleanup no group is left."""
    left = [each[6] for each in _run(m, 2)]
    assert left == [False, False], (
        "a process group is left after compute_cleanup: torch warns about leaks when the process ends"
    )


MUTANTS = [
    Mutant("mps before cuda", 'if torch.cuda.is_available():\n        return "cuda"\n    return "mps" if torch.backends.mps.is_available() else "cpu"', 'if torch.backends.mps.is_available():\n        return "mps"\n    return "cuda" if torch.cuda.is_available() else "cpu"', "device_order"),
    Mutant("a device in place of its type", 'return "mps" if torch.backends.mps.is_available() else "cpu"', 'return torch.device("mps" if torch.backends.mps.is_available() else "cpu")', "device_order"),
    Mutant("the type that is given is ignored", "device_type or autodetect_device_type()", "autodetect_device_type()", "device_given"),
    Mutant("seeded by rank", "torch.manual_seed(seed)", "torch.manual_seed(seed + rank)", "equal_start"),
    Mutant("not seeded", "    torch.manual_seed(seed)\n", "", "seed"),
    Mutant("GPU by rank", 'int(os.environ.get("LOCAL_RANK", "0"))', "rank", "local_gpu"),
    Mutant("all processes on the first GPU", "        torch.cuda.set_device(device)\n", "", "local_gpu"),
    Mutant("gloo on GPUs", '"nccl" if kind == "cuda" else "gloo"', '"gloo"', "local_gpu"),
    Mutant("a group of one", "if world_size > 1:\n        dist.init", 'if "RANK" in os.environ or not os.environ.setdefault("RANK", "0") or not os.environ.setdefault("WORLD_SIZE", "1") or os.environ.setdefault("MASTER_ADDR", "127.0.0.1") and os.environ.setdefault("MASTER_PORT", "0"):\n        dist.init', "alone"),
    Mutant("no group", "if world_size > 1:\n        dist.init", "if False:\n        dist.init", "world"),
    Mutant("no exchange", "    dist.all_reduce(total)\n", "", "sum"),
    Mutant("mean in place of the sum", "return total.item()", "return total.item() / setup.world_size", "sum"),
    Mutant("the group is left open", "        dist.destroy_process_group()", "        pass", "cleanup"),
]  # fmt: skip
