"""Train by the mean over all targets and by the mean of means. python -m course.ch08_sft_loop.ablation (seconds)

Short rows follow one rule, long rows another, and half of the micro-batches are short: a mean of means listens to them.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from course.ch08_sft_loop.laws import Model, V
from course.ch08_sft_loop.solution import train_step

STEPS = 150


def rows(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of one row: four with one target, four with sixteen; the two kinds contradict each other."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for i in range(8):
        inputs = torch.randint(V, (1, 1 if i % 2 else 16), generator=generator)
        found.append((inputs, (inputs + (1 if i % 2 else 2)) % V))
    return found


def mean_of_means(model: Model, optimizer: torch.optim.Optimizer, micro_batches: list) -> None:
    optimizer.zero_grad()
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / len(micro_batches)).backward()
    optimizer.step()


def main(picture: Path) -> None:
    held_out = torch.arange(V)[None]
    for name, step in (("mean over all", train_step), ("mean of means", mean_of_means)):
        model, losses = Model(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for number in range(STEPS):
            step(model, optimizer, rows(number))
            with torch.no_grad():
                losses.append(float(cross_entropy(model(held_out).flatten(0, 1), (held_out[0] + 2) % V)))
        print(f"{name:14} loss on the rule of the long rows, 94% of all targets: {losses[-1]:.3f}")
        plt.plot(losses, label=name)
    plt.xlabel("step")
    plt.ylabel("loss on the rule of the long rows")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_sft_loop.png"))
