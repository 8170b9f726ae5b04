"""Measure decoding with and without a cache at growing lengths. python -m course.ch05_engine.ablation (under a minute)"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from course.ch04_block.solution import Config
from course.ch05_engine.solution import GPT, Engine, generate_naive

LENGTHS = (10, 25, 50, 100, 200, 400)


def main(picture: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(Config(hidden_size=128, intermediate_size=512), layers=4).eval()
    engine, prompt = Engine(model), [1] * 8
    generate_naive(model, prompt, 10), engine.generate(prompt, 10)  # the first calls warm up
    naive, cached = [], []
    for length in LENGTHS:
        for seconds, run in (
            (naive, lambda n: generate_naive(model, prompt, n)),
            (cached, lambda n: engine.generate(prompt, n)),
        ):
            started = time.perf_counter()
            run(length)
            seconds.append(time.perf_counter() - started)
        print(
            f"{length:4d} tokens: naive {naive[-1]:.3f} s, cached {cached[-1]:.3f} s, {naive[-1] / cached[-1]:.1f} times"
        )
    for name, seconds in (("naive", naive), ("cached", cached)):
        plt.plot(LENGTHS, [1000 * s / n for s, n in zip(seconds, LENGTHS, strict=True)], marker="o", label=name)
    plt.xlabel("new tokens")
    plt.ylabel("milliseconds a token")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_engine.png"))
