"""Draw the picture of chapter 1: attempts and waits. python -m course.ch01_downloader.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

ATTEMPTS = (("503", 0.3), ("cut off", 2.0), ("cut off", 1.2), ("whole", 3.5))


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 1.8), layout="constrained")
    now = 0.0
    for i, (what, seconds) in enumerate(ATTEMPTS):
        color = "tab:green" if what == "whole" else "tab:red"
        axes.barh(0, seconds, left=now, color=color)
        axes.text(now + seconds / 2, 0.5, what, ha="center", va="bottom")
        now += seconds
        if what != "whole":
            axes.barh(0, 2**i, left=now, color="lightgray")
            axes.text(now + 2**i / 2, 0, f"wait {2**i} s", ha="center", va="center")
            now += 2**i
    axes.text(now, 0, " rename", va="center")
    axes.set(xlabel="seconds", yticks=[], xlim=(0, now + 1.5), ylim=(-0.5, 0.9))
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
