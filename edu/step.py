"""One optimizer step, for every stage: loss = sum(w * -log p) / N, whatever the split into batches and processes.

N counts the targets that are not -1 (or what a term counts instead) over all micro-batches and all processes of the
step. Dividing by each micro-batch's own count would weigh tokens by how empty their neighbours are: the mean of means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edu.optim import MuonAdamW
from edu.packing import IGNORE, Batch


@dataclass(frozen=True)
class Term:
    """One sum of the loss: this process's micro-batches of it, and its factor."""

    batches: Sequence[Batch]
    scale: float = 1.0
    left_out: int = 0
    """Targets of weight 0 that count in N but were left out of the batches, since their gradient is zero."""
    count: int | None = None
    """This process's part of N, where that is not its number of targets."""


@dataclass(frozen=True)
class StepResult:
    """What a step did: the loss of each term (nats per target), the targets of the first, the norm before clipping."""

    losses: list[float]
    tokens: int
    grad_norm: float
    skipped: bool


def _sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, on the device."""
    total = accelerator.reduce(values.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total


def train_step(
    accelerator: Accelerator, model: nn.Module, optimizer: MuonAdamW, terms: Sequence[Term], clip: float = 1.0
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip, update. Every process must bring as many micro-batches.

    1. Add up N of each term over all processes.
    2. Backward each micro-batch, scaled so that accelerate's mean over micro-batches and DDP's over processes cancel.
    3. Clip and update once, with the last one.
    """
    targets = [t.left_out + sum(int((b.targets != IGNORE).sum()) for b in t.batches) for t in terms]
    parts = [n if t.count is None else t.count for n, t in zip(targets, terms, strict=True)]
    tokens, counts = _sum(accelerator, torch.tensor([targets, parts])).clamp(min=1)
    micro = [(i, batch.to(accelerator.device)) for i, term in enumerate(terms) for batch in term.batches]
    sums = torch.zeros(len(terms), device=accelerator.device)
    grad_norm = float("nan")
    accelerator.gradient_accumulation_steps, accelerator.step = len(micro), 0
    for i, batch in micro:
        with accelerator.accumulate(model):
            logprobs = model(batch.inputs, targets=batch.targets, position_ids=batch.positions)
            loss = -(batch.weights * logprobs).sum() / counts[i]
            sums[i] += loss.detach()
            accelerator.backward(loss * terms[i].scale * len(micro) * accelerator.num_processes)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                grad_norm = float("nan") if norm is None else float(norm)
            optimizer.step()
            optimizer.zero_grad()
    losses = _sum(accelerator, sums).tolist()
    return StepResult(losses, int(tokens[0]), grad_norm, bool(getattr(optimizer, "step_was_skipped", False)))
