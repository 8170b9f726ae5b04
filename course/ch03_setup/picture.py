"""Draw the picture of chapter 3: nodes, ranks and an all-reduce. python -m course.ch03_setup.picture"""

from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 2.8), layout="constrained")
    for rank in range(8):
        node, local = divmod(rank, 4)
        x = rank * 1.2 + node * 0.6
        axes.add_patch(plt.Rectangle((x, 0), 1, 1, facecolor=f"C{node}", alpha=0.3))
        axes.text(x + 0.5, 0.5, f"RANK {rank}\nLOCAL_RANK {local}\ncuda:{local}", ha="center", va="center", fontsize=9)
        axes.annotate("", (5.2, 1.75), (x + 0.5, 1), arrowprops={"arrowstyle": "<->", "color": "gray"})
    axes.text(5.2, 1.8, "all-reduce: each brings its gradient, each gets the sum", ha="center", va="bottom")
    for node in range(2):
        axes.text(node * 5.4 + 2.3, -0.1, f"node {node}", ha="center", va="top")
    axes.set(xlim=(-0.2, 10.5), ylim=(-0.5, 2.1))
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
