"""What the tests of several processes run: `torchrun ... tests/worker.py OUT MICRO_BATCH_SIZE` trains 20 steps on fixed rows."""

import sys
from pathlib import Path

import numpy as np
import torch

from edu.gpt_config import GPTConfig
from edu.loop import split_rows
from edu.model import GPT
from edu.optim import make_optimizer
from edu.packing import Piece, collate
from edu.runtime import compute_init
from edu.step import Term, train_step

T = 24


def rows_of(step: int) -> list[list[Piece]]:
    """Eight rows with ragged masks, some empty, and weights of both signs; a ninth now and then: a last short window."""
    rng = np.random.default_rng(step)
    rows = []
    for i in range(8 + step % 2):
        size = int(rng.integers(2, T + 1))
        mask = (rng.random(size) < rng.random()) * (i != 3)
        rows.append([Piece(rng.integers(0, 512, size), mask, rng.normal(1, 0.5, size))])
    return rows


def train(micro_batch_size: int, steps: int = 20) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Parameters after the steps in fp64, and the losses, gradient norms and token counts on the way."""
    accelerator = compute_init(seed=0)
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny()).double()
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, **settings))
    curve = []
    for step in range(steps):
        terms = []
        for rows, scale in ((rows_of(step), 1.0), (rows_of(1000 + step)[:3], 0.1)):
            batches = [collate(part or [[]], T) for part in split_rows(rows, micro_batch_size, accelerator)]
            # The second term counts its rows instead of its targets.
            terms.append(Term(batches, scale, count=sum(map(len, split_rows(rows, 1, accelerator))) if terms else None))
        result = train_step(accelerator, wrapped, optimizer, terms)
        curve.append([*result.losses, result.grad_norm, result.tokens])
    return {name: p.detach() for name, p in accelerator.unwrap_model(wrapped).named_parameters()}, curve


if __name__ == "__main__":
    parameters, curve = train(int(sys.argv[2]))
    torch.save((parameters, curve), Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
