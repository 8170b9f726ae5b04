"""Draw the picture of chapter 2: documents, stream, inputs and targets. python -m course.ch02_loader.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

DOCUMENTS, B, T = ("the cat", "a dog ran", "sun"), 2, 8


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 3.2), layout="constrained")
    stream = [(token, i) for i, text in enumerate(DOCUMENTS) for token in ("bos", *text)]
    lines = {"stream": (3.4, 0, stream)}
    for row in range(B):
        lines[f"inputs, row {row}"] = (2.2 - 1.1 * row, row * T, stream[row * T : (row + 1) * T])
        lines[f"targets, row {row}"] = (1.75 - 1.1 * row, row * T, stream[row * T + 1 : (row + 1) * T + 1])
    for y, start, tokens in lines.values():
        for i, (token, document) in enumerate(tokens):
            axes.add_patch(plt.Rectangle((start + i, y), 0.95, 0.4, facecolor=f"C{document}", alpha=0.35))
            axes.text(start + i + 0.47, y + 0.2, token, ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.2, len(stream) + 0.2), ylim=(0.5, 4), xticks=[])
    axes.set_yticks([y + 0.2 for y, _, _ in lines.values()], list(lines))
    axes.set_frame_on(False)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
