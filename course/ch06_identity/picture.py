"""Draw the picture of chapter 6: from starter to line. python -m course.ch06_identity.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

BOXES = {
    "starter\n+ persona": 0,
    "teacher": 2.2,
    "right form?": 4.4,
    "new, and not\nheld out?": 6.6,
    "a line of\nthe file": 8.8,
}


def main() -> None:
    figure, axes = plt.subplots(figsize=(10, 2.2), layout="constrained")
    for text, x in BOXES.items():
        axes.add_patch(plt.Rectangle((x, 0), 1.6, 0.8, facecolor="tab:blue", alpha=0.25))
        axes.text(x + 0.8, 0.4, text, ha="center", va="center")
        if x < 8:
            axes.annotate("", (x + 2.2, 0.4), (x + 1.6, 0.4), arrowprops={"arrowstyle": "->"})
    back = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.35", "color": "tab:red"}
    axes.annotate("", (3, 0.85), (5.2, 0.85), arrowprops=back)
    axes.text(4.1, 1.35, "no: again, with the reason", ha="center", color="tab:red")
    axes.annotate("", (7.4, -0.5), (7.4, -0.02), arrowprops={"arrowstyle": "->", "color": "tab:red"})
    axes.text(7.4, -0.55, "left out", ha="center", va="top", color="tab:red")
    axes.set(xlim=(-0.2, 10.6), ylim=(-0.9, 1.6))
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
