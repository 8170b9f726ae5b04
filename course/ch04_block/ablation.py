"""Train a small model with and without parts of the block, and plot the losses. python -m course.ch04_block.ablation

The text is made here: letters in which every later one can be told from an earlier one at a fixed distance, so that a
model must know distances. About a minute on two cores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from course.ch04_block import solution
from course.ch04_block.solution import Block, Config, rms_norm

VOCABULARY, T, STEPS = 16, 32, 300


@dataclass(frozen=True)
class Variant:
    name: str
    rope: bool = True
    qk_norm: bool = True
    lr: float = 3e-3


VARIANTS = [
    Variant("the block"),
    Variant("without RoPE", rope=False),
    Variant("high rate", lr=3e-2),
    Variant("high rate, no QK norm", qk_norm=False, lr=3e-2),
]


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.ModuleList(Block(Config()) for _ in range(2))
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(rms_norm(x))


def batch(generator: torch.Generator) -> Tensor:
    """Rows in which token t is token t - 5 plus token t - 2, modulo the vocabulary, after a random beginning."""
    ids = torch.randint(VOCABULARY, (32, T + 1), generator=generator)
    for t in range(5, T + 1):
        ids[:, t] = (ids[:, t - 5] + ids[:, t - 2]) % VOCABULARY
    return ids


def train(variant: Variant) -> list[float]:
    """Return the loss of each step, on the positions that can be told."""
    rotate, norm = solution.apply_rotary_emb, solution.rms_norm
    if not variant.rope:
        solution.apply_rotary_emb = lambda x, *_: x
    if not variant.qk_norm:  # queries and keys have four dimensions, the stream has three
        solution.rms_norm = lambda x, eps=1e-6: x if x.ndim == 4 else norm(x, eps)
    torch.manual_seed(0)
    model, generator, losses = Model(), torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=variant.lr)
    try:
        for _ in range(STEPS):
            ids = batch(generator)
            logits = model(ids[:, :-1])[:, 4:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        solution.apply_rotary_emb, solution.rms_norm = rotate, norm
    return losses


def main(picture: Path) -> None:
    for variant in VARIANTS:
        losses = train(variant)
        print(f"{variant.name:24} loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}", flush=True)
        plt.plot(losses, label=variant.name)
    plt.xlabel("step")
    plt.ylabel("loss (guessing: 2.77)")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_block.png"))
