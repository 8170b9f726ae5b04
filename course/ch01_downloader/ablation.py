"""Count whole, missing and damaged shards with and without each habit. python -m course.ch01_downloader.ablation

The network is simulated: a tenth of the transfers break off, a tenth of the answers say 503, and the process is killed
now and then and started again. Seconds.
"""

import random
import sys
from pathlib import Path

import matplotlib.pyplot as plt

SHARDS = 200
HABITS = {
    "all three": (True, True, True),
    "no retries": (False, True, True),
    "no check": (True, False, True),
    "no rename": (True, True, False),
}


class Killed(Exception):
    """The process was killed."""


def transfer(dice: random.Random, disk: dict[int, str], shard: int, rename: bool) -> str:
    """One transfer; what arrived: whole or part. Without the rename the final name is there from the start."""
    if not rename:
        disk[shard] = "part"
    if dice.random() < 0.02:
        raise Killed
    if dice.random() < 0.1:
        return "busy"
    return "part" if dice.random() < 0.1 else "whole"


def run(retry: bool, check: bool, rename: bool) -> dict[str, int]:
    """Fetch all shards, starting again after each kill: a shard whose final name is there is taken as complete."""
    dice, disk = random.Random(0), dict[int, str]()
    while True:
        try:
            for shard in range(SHARDS):
                for _ in range(6 if retry and shard not in disk else int(shard not in disk)):
                    arrived = transfer(dice, disk, shard, rename)
                    if arrived == "whole" or (arrived == "part" and not check):
                        disk[shard] = arrived
                        break
                    disk.pop(shard, None)
            break
        except Killed:
            continue
    kinds = [disk.get(shard, "missing") for shard in range(SHARDS)]
    return {"whole": kinds.count("whole"), "missing": kinds.count("missing"), "damaged": kinds.count("part")}


def main(picture: Path) -> None:
    left = [0] * len(HABITS)
    found = {name: run(*habits) for name, habits in HABITS.items()}
    for name, counts in found.items():
        print(f"{name:12} " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    plt.figure(figsize=(8, 2.4), layout="constrained")
    for kind, color in (("whole", "tab:green"), ("missing", "lightgray"), ("damaged", "tab:red")):
        counts = [found[name][kind] for name in HABITS]
        plt.barh(list(HABITS), counts, left=left, color=color, label=kind)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    plt.legend()
    plt.xlabel("shards")
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the bars: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_downloader.png"))
