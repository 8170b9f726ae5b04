"""Train with and without the end token in the loss, and count how long the model talks. python -m course.ch07_sft_data.ablation

Conversations are made here: a letter is asked for, and answered by so many copies of it. Under a minute.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from course.ch04_block.solution import Config
from course.ch05_engine.solution import GPT, Engine
from course.ch07_sft_data.laws import T, _chat
from course.ch07_sft_data.solution import sft_batch

STEPS, LIMIT = 120, 40


def conversation(number: int) -> dict:
    letter, count = "abcdefgh"[number % 8], 1 + number % 5
    return _chat(("user", f"{count}{letter}"), ("assistant", letter * count))


def train(learn_stop: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(), vocabulary=266)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs, targets = sft_batch([conversation(i) for i in range(40)], T)
    if not learn_stop:
        targets = targets.where(targets != T.assistant_end, -1)
    for _ in range(STEPS):
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main(picture: Path) -> None:
    for i, (name, learn) in enumerate((("end token learned", True), ("end token masked", False))):
        engine, lengths = Engine(train(learn)), []
        for number in range(40):
            question = f"{1 + number % 5}{'abcdefgh'[number % 8]}"
            prompt = [T.bos, T.user_start, *T.encode(question), T.user_end, T.assistant_start]
            (answer,) = engine.generate(prompt, LIMIT, stop_tokens=(T.assistant_end,))
            lengths.append(len(answer))
        ended = sum(length < LIMIT for length in lengths)
        print(
            f"{name}: {ended} of {len(lengths)} answers end by themselves, mean length {sum(lengths) / len(lengths):.1f}"
        )
        plt.hist(lengths, bins=range(0, LIMIT + 3, 2), alpha=0.6, label=name, color=f"C{i}")
    plt.xlabel(f"tokens of an answer (cut off at {LIMIT})")
    plt.ylabel("answers")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the histogram: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_sft_data.png"))
