"""Draw the picture of chapter 7: inputs and targets of a conversation. python -m course.ch07_sft_data.picture"""

from pathlib import Path

import matplotlib.pyplot as plt

from course.ch07_sft_data.laws import MARKS, Bytes, _chat
from course.ch07_sft_data.solution import sft_batch


def main() -> None:
    tokenizer = Bytes()
    inputs, targets = sft_batch([_chat(("user", "Hi"), ("assistant", "Yo!"))], tokenizer)
    figure, axes = plt.subplots(figsize=(10, 2.2), layout="constrained")
    for t, (token, target) in enumerate(zip(inputs[0].tolist(), targets[0].tolist(), strict=True)):
        for y, value in ((1, token), (0, target)):
            learned = y == 0 and value != -1
            color = "tab:blue" if learned else "lightgray" if y == 0 else "white"
            axes.add_patch(plt.Rectangle((t, y), 0.95, 0.85, facecolor=color, edgecolor="gray"))
            text = "-1" if value == -1 else chr(value) if value < 256 else MARKS[value - 256].replace("_", "\n")
            axes.text(
                t + 0.47, y + 0.42, text, ha="center", va="center", color="white" if learned else "black", fontsize=9
            )
    axes.set(
        xlim=(-0.1, inputs.shape[1]), ylim=(-0.1, 2), yticks=[0.42, 1.42], yticklabels=["targets", "inputs"], xticks=[]
    )
    axes.set_frame_on(False)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=90)


if __name__ == "__main__":
    main()
