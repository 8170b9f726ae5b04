"""Grade the same simulated completions by four readers. python -m course.ch09_gsm8k.ablation (a second)"""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt

from course.ch09_gsm8k.solution import extract_answer


def first_mark(text: str) -> str | None:
    """The number behind the first mark, where the last should count."""
    head = text.split("####", 2)[:2]
    return extract_answer("####".join(head))


def as_text(text: str) -> str | None:
    """What stands behind the mark, letter by letter."""
    return text.rpartition("#### ")[2] or None


def last_number(text: str) -> str | None:
    """The last number anywhere: a lenient reader."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


READERS: dict[str, Callable[[str], str | None]] = {
    "strict (the solution)": extract_answer,
    "compared as text": as_text,
    "first mark counts": first_mark,
    "last number anywhere": last_number,
}


def completion(truth: int, dice: random.Random) -> str:
    """A completion of a model that knows half of the answers, and writes in several ways."""
    said = truth if dice.random() < 0.5 else truth + dice.randint(1, 9)
    ways = (
        f"#### {said}",
        f"#### {said:,}",
        f"#### {said}.0",
        f"#### {said + 1}\nno,\n#### {said}",
        f"so it is {said}",
    )
    guesses = f"#### {' or '.join(str(truth + i) for i in range(-2, 1))}"
    return dice.choice((*ways, guesses))


def main(picture: Path) -> None:
    dice = random.Random(0)
    problems = [(truth, completion(truth, dice)) for truth in (dice.randint(900, 1100) for _ in range(1000))]
    shares = {}
    for name, reader in READERS.items():
        shares[name] = sum(reader(text) == str(truth) for truth, text in problems) / len(problems)
        print(f"{name:24} {shares[name]:.1%} right")
    plt.figure(figsize=(8, 2.6), layout="constrained")
    plt.barh(list(shares), list(shares.values()))
    plt.xlabel("share of the same 1,000 completions that is called right")
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the bars: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_gsm8k.png"))
