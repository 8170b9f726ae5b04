"""Draw the picture of chapter 4: rotation by position, and heads that share keys. python -m course.ch04_block.picture"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, pair, speed in ((left, 0, 1.0), (middle, 2, 10_000 ** -(4 / 16))):
        for position in range(8):
            angle = -position * speed
            axes.annotate(
                "", (np.cos(angle), np.sin(angle)), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{position}"}
            )
            axes.text(1.12 * np.cos(angle), 1.12 * np.sin(angle), str(position), color=f"C{position}", ha="center")
        axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        axes.set_title(f"pair {pair}: {speed:g} rad a position")
        axes.set(xlabel=f"channel {pair}", ylabel=f"channel {pair} + D/2", xticks=[0], yticks=[0])
    T, H, K = 8, 4, 2
    right.imshow(np.tril(np.ones((T, T))), cmap="Blues", vmax=2, extent=(0, T, T, 0))
    right.set(xticks=range(T + 1), yticks=range(T + 1), xlabel="key position", ylabel="query position")
    right.grid(color="white")
    right.set_title("blue: may be seen")
    shared = ", ".join(f"q{h} reads k{h * K // H}" for h in range(H))
    figure.suptitle(f"rotation by position (D = 16); causal mask; grouped heads: {shared}", fontsize=11)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
