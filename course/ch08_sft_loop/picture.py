"""Draw the picture of chapter 8: weights of targets under two means. python -m course.ch08_sft_loop.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

COUNTS = (1, 8)


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    total = sum(COUNTS)
    weights = {
        "mean of means": [1 / (len(COUNTS) * count) for count in COUNTS for _ in range(count)],
        "mean over all": [1 / total] * total,
    }
    colors = [f"C{i}" for i, count in enumerate(COUNTS) for _ in range(count)]
    for each, (name, values) in zip(axes, weights.items(), strict=True):
        each.bar(range(total), values, color=colors)
        each.set(title=name, xlabel="target (blue: micro-batch 0, orange: micro-batch 1)", xticks=range(total))
    axes[0].set_ylabel("weight in the loss")
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
