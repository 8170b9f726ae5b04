"""Train on two processes with and without a group and equal seeds. python -m course.ch03_setup.ablation (half a minute)"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

from course.ch03_setup.solution import compute_cleanup, compute_init

STEPS = 60
VARIANTS = {"group, equal seeds": (True, True), "group, seeds by rank": (True, False), "no group": (False, True)}


def worker(grouped: bool, equal: bool) -> None:
    """Train a linear model on this process's data, averaging gradients where there is a group; print its weights by step."""
    rank = int(os.environ["RANK"])
    if not grouped:
        os.environ["WORLD_SIZE"] = "1"
    setup = compute_init(0 if equal else rank, "cpu")
    weights = torch.randn(8, requires_grad=True)
    data = torch.Generator().manual_seed(100 + rank)  # data differ on purpose
    history = []
    for _ in range(STEPS):
        x = torch.randn(16, 8, generator=data)
        loss = ((x @ weights - x.sum(-1) + torch.randn(16, generator=data)) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        if grouped:
            dist.all_reduce(gradient)
            gradient /= setup.world_size
        with torch.no_grad():
            weights -= 0.02 * gradient
        history.append(weights.tolist())
    compute_cleanup(setup)
    print(json.dumps(history))


def main(picture: Path) -> None:
    for name, (grouped, equal) in VARIANTS.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(2):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, "-m", "course.ch03_setup.ablation", "worker", str(int(grouped)), str(int(equal))]
            environment = {**os.environ, **told, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        first, second = (torch.tensor(json.loads(process.communicate()[0])) for process in processes)
        apart = (first - second).norm(dim=-1)
        print(f"{name:22} the copies are {float(apart[-1]):.3f} apart after {STEPS} steps")
        plt.plot(apart.tolist(), label=name)
    plt.xlabel("step")
    plt.ylabel("distance of the two copies")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        worker(*(bool(int(word)) for word in sys.argv[2:4]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_setup.png"))
