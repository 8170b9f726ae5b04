"""Draw the picture of chapter 5: a cache that fills. python -m course.ch05_engine.picture"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

WORDS = ("The", "sky", "is", "blue", "today", ".")


def main() -> None:
    figure, rows = plt.subplots(4, 1, figsize=(9, 4), layout="constrained")
    for step, axes in enumerate(rows):
        cells = np.zeros(len(WORDS) + 2)
        cells[: 3 + step] = 1
        cells[slice(0, 3) if step == 0 else slice(2 + step, 3 + step)] = 2
        axes.imshow(cells[None], cmap="Blues", vmin=0, vmax=3, aspect="auto")
        for i, word in enumerate(WORDS[: 3 + step]):
            axes.text(i, 0, word, ha="center", va="center")
        name = "prefill: writes 3" if step == 0 else f"step {step}: writes 1, reads {3 + step}"
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=np.arange(len(cells)) - 0.5, yticks=[], xticklabels=[])
        axes.grid(color="white", linewidth=3)
    figure.suptitle("keys and values of one layer, one row: dark is written now, light was there, white is still free")
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
