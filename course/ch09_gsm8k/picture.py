"""Draw the picture of chapter 9: completions and what they earn. python -m course.ch09_gsm8k.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

from course.ch09_gsm8k.solution import extract_answer

COMPLETIONS = (
    "6*7 = 42\n#### 42",
    "#### 41\nno:\n#### 42",
    "#### 42\n#### 41",
    "#### 42.0",
    "#### 41 or 42",
    "it is 42",
)


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    rows = [(repr(text)[1:-1], str(extract_answer(text)), float(extract_answer(text) == "42")) for text in COMPLETIONS]
    table = axes.table(rows, colLabels=("completion", "extracted", "reward (truth: 42)"), loc="center", cellLoc="left")
    for i, row in enumerate(rows):
        table[i + 1, 2].set_facecolor("honeydew" if row[2] else "mistyrose")
    table.scale(1, 1.4)
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
