"""Train on shards in order and mixed, and plot the loss. python -m course.ch02_loader.ablation (half a minute)

Each shard counts in its own steps: +1, +2, +3 or +5. In order, a model learns one and forgets the one before.
"""

import random
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy

from course.ch02_loader.laws import Bytes
from course.ch02_loader.solution import stream_batches
from course.ch04_block.solution import Config
from course.ch05_engine.solution import GPT

STEPS, B, T = 240, 16, 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(step: int, dice: random.Random) -> str:
    start = dice.randrange(26)
    return "".join(LETTERS[(start + step * i) % 26] for i in range(40))


def train(paths: list[Path]) -> list[float]:
    torch.manual_seed(0)
    model, losses = GPT(Config(), vocabulary=257), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _, (inputs, targets, _) in zip(range(STEPS), stream_batches(paths, Bytes(), B, T), strict=False):
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(picture: Path) -> None:
    dice = random.Random(0)
    per_shard = STEPS * B * T // (4 * 41) + 1
    shards = [[text(step, dice) for _ in range(per_shard)] for step in (1, 2, 3, 5)]
    mixed = [entry for shard in shards for entry in shard]
    dice.shuffle(mixed)
    orders = {"shards in order": shards, "mixed": [mixed]}
    for name, files in orders.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.parquet" for i in range(len(files))]
            for path, texts in zip(paths, files, strict=True):
                pq.write_table(pa.table({"text": texts}), path)
            losses = train(paths)
        worst = max(losses[60:])
        print(f"{name:16} loss at the end {sum(losses[-10:]) / 10:.2f}, worst after step 60: {worst:.2f}")
        plt.plot(losses, label=name)
    plt.xlabel("step (a new shard every 60)")
    plt.ylabel("loss")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_loader.png"))
