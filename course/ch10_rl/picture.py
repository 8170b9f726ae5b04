"""Draw the picture of chapter 10: a group of answers with rewards and advantages. python -m course.ch10_rl.picture"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from course.ch10_rl.solution import advantages

REWARDS = [1.0, 0, 0, 1, 0, 0, 1, 0]


def main() -> None:
    found = advantages(torch.tensor([REWARDS]))[0].tolist()
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    axes.bar(range(8), found, color=["tab:green" if a > 0 else "tab:red" for a in found])
    axes.axhline(0, color="gray", linewidth=1)
    labels = [f"answer {i}\nreward {reward:.0f}" for i, reward in enumerate(REWARDS)]
    axes.set(xticks=range(8), ylabel="advantage", title="8 answers to one problem: reward - mean of the group (0.375)")
    axes.set_xticklabels(labels)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
