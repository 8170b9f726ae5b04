"""Count different conversations by the number of starters. python -m course.ch06_identity.ablation (a second)

The teacher is simulated: to each starter it knows a dozen answers, and gives the first ones most of the time.
"""

import random
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from course.ch06_identity.laws import Teacher, _chat, _starter_in
from course.ch06_identity.solution import STARTERS, make_identity

WANTED = 200


def main(picture: Path) -> None:
    counts = []
    numbers = (1, 5, 20, len(STARTERS))
    for number in numbers:
        dice, starters = random.Random(0), STARTERS[:number]

        def answer(_: int, text: str, dice: random.Random = dice, starters: list[str] = starters) -> str:
            return _chat(_starter_in(text, starters), f"answer {min(11, int(dice.expovariate(0.5)))}")

        with tempfile.TemporaryDirectory() as folder:
            counts.append(make_identity(Teacher(answer), "simulated", Path(folder) / "x.jsonl", WANTED, starters))
        print(f"{number:3d} starters: {counts[-1]} different conversations of {WANTED} asked for")
    plt.figure(figsize=(7, 2.6), layout="constrained")
    plt.bar([str(number) for number in numbers], counts)
    plt.axhline(WANTED, color="gray", linestyle=":")
    plt.xlabel("starters")
    plt.ylabel("different conversations")
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the bars: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_identity.png"))
