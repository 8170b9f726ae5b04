"""What the tests of several processes run: `torchrun ... tests/worker.py OUT MICRO_BATCH_SIZE` trains 20 steps on fixed rows."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from edu.data.packing import TrainingExample, collate
from edu.model.config import GPTConfig
from edu.model.gpt import GPT
from edu.training.accelerator import compute_init
from edu.training.loop import generating, split_rows
from edu.training.optimizer import make_optimizer, whole
from edu.training.step import Term, fits, train_step

T = 24
SHARDED = "ACCELERATE_USE_FSDP" in os.environ
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""What `accelerate launch` tells the processes by accelerate_configs/fsdp2.yaml."""


def rows_of(step: int) -> list[list[TrainingExample]]:
    """Eight rows with ragged masks, some empty, and weights of both signs; a ninth now and then: a last short window."""
    rng = np.random.default_rng(step)
    rows = []
    for i in range(8 + step % 2):
        size = int(rng.integers(2, T + 1))
        mask = (rng.random(size) < rng.random()) * (i != 3)
        rows.append([TrainingExample(rng.integers(0, 512, size), mask, rng.normal(1, 0.5, size))])
    return rows


def train(micro_batch_size: int, steps: int = 20) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Parameters after the steps in fp64, and the losses, gradient norms and token counts on the way."""
    accelerator = compute_init(seed=0)
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny()).double()
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, **settings))
    assert all(isinstance(p, DTensor) for p in wrapped.parameters()) == SHARDED
    curve = []
    for step in range(steps):
        terms = []
        for rows, scale in ((rows_of(step), 1.0), (rows_of(1000 + step)[:3], 0.1)):
            batches = [collate(part or [[]], T) for part in split_rows(rows, micro_batch_size, accelerator)]
            # The second term counts its rows instead of its targets.
            terms.append(Term(batches, scale, count=sum(map(len, split_rows(rows, 1, accelerator))) if terms else None))
        if step == steps // 2:  # as if a checkpoint had been written and read
            optimizer.load_state_dict(optimizer.state_dict())
        result = train_step(accelerator, wrapped, optimizer, terms)
        curve.append([*result.losses, result.grad_norm, result.tokens])
    with generating(accelerator, wrapped) as plain:
        return {name: p.detach() for name, p in plain.named_parameters()}, curve


def gradients(micro_batch_size: int) -> dict[str, torch.Tensor]:
    """The gradients of one step in fp32, of weights far enough from the start that none is zero."""
    accelerator = compute_init(seed=0)
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny())
    for p in model.parameters():
        p.data.normal_(std=0.05)
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.0}
    optimizer, kept = make_optimizer(model, **settings), {}
    wrapped, prepared = accelerator.prepare(model, optimizer)
    grads = dict(accelerator.unwrap_model(wrapped).named_parameters())
    optimizer.register_step_pre_hook(lambda *_: kept.update({n: whole(p.grad).clone() for n, p in grads.items()}))
    batches = [collate(part or [[]], T) for part in split_rows(rows_of(1), micro_batch_size, accelerator)]
    train_step(accelerator, wrapped, prepared, [Term(batches)], clip=1e9)
    return kept


def skipping() -> list[bool]:
    """Return whether a step was skipped in which no process, the last one, all have a weight; check that all then agree."""
    accelerator = compute_init(seed=0)
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny())
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, **settings))
    train_step(accelerator, wrapped, optimizer, [Term([collate(rows_of(0), T)])])
    found = []
    for weights in ([0.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        rows = [[replace(e, weight=weights[accelerator.process_index]) for e in row] for row in rows_of(1)]
        before = [whole(p).detach().clone() for p in wrapped.parameters()]
        result = train_step(accelerator, wrapped, optimizer, [Term([collate(rows, T)])])
        moved = any(not torch.equal(whole(p), q) for p, q in zip(wrapped.parameters(), before, strict=True))
        assert moved != result.skipped
        found.append(result.skipped)
    return found


def fitting(rows: int) -> list[bool]:
    """Whether a micro-batch fits, whole and in four parts, where the last process has memory for `rows` rows."""
    accelerator = compute_init(seed=0)
    model = GPT(GPTConfig.tiny())
    wrapped = accelerator.prepare(model)
    if accelerator.is_last_process:

        def check(_: object, args: tuple[torch.Tensor, ...]) -> None:
            if len(args[0]) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(check)
    term = Term([collate(rows_of(0), T)])
    answers = [fits(accelerator, wrapped, [term.split(parts)]) for parts in (1, 4)]
    assert all(p.grad is None for p in model.parameters())
    return answers


if __name__ == "__main__":
    micro_batch_size = int(sys.argv[2])
    found = (*train(micro_batch_size), gradients(micro_batch_size), skipping(), [] if SHARDED else fitting(rows=2))
    torch.save(found, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
