"""One optimizer step, for every stage: loss = sum(w * -log p) / N, whatever the split into batches and processes.

N counts the targets that are not -1 (or what a term counts instead) over all micro-batches and all processes of the
step. Dividing by each micro-batch's own count would weigh tokens by how empty their neighbours are: the mean of means.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edu.data.packing import IGNORE, Batch
from edu.training.optimizer import MuonAdamW, whole


@dataclass(frozen=True)
class Term:
    """One sum of the loss: this process's micro-batches of it, and its factor."""

    batches: Sequence[Batch]
    scale: float = 1.0
    left_out: int = 0
    """Targets of weight 0 that count in N but were left out of the batches, since their gradient is zero."""
    count: int | None = None
    """This process's part of N, where that is not its number of targets."""

    def split(self, parts: int) -> "Term":
        """The same term in micro-batches of a parts-th of the rows, the last ones perhaps empty."""
        return replace(self, batches=[part for batch in self.batches for part in batch.split(parts)])


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes."""

    losses: list[float]
    """Of each term, in nats per target."""
    tokens: int
    """Targets of the first term."""
    positions: int
    """Places computed, those without a target included: what the FLOPs are counted from."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Whether fp16 overflowed, so that nothing was updated."""


def _sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, on the device."""
    total = accelerator.reduce(values.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total


def _weighted_sum(model: nn.Module, batch: Batch) -> Tensor:
    """sum(w * log p) of a micro-batch."""
    return model(batch.inputs, targets=batch.targets, weights=batch.weights, position_ids=batch.positions)


def train_step(
    accelerator: Accelerator, model: nn.Module, optimizer: MuonAdamW, terms: Sequence[Term], clip: float = 1.0
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip, update. Every process must bring as many micro-batches.

    1. Add up N of each term over all processes.
    2. Backward each micro-batch, scaled so that accelerate's mean over micro-batches and DDP's or FSDP's over processes cancel.
    3. Clip and update once, after the last one.

    torch.OutOfMemoryError leaves model and optimizer as they were before the step.
    """
    micro = [(i, batch) for i, term in enumerate(terms) for batch in term.batches]
    targets = [t.left_out + sum(int((b.targets != IGNORE).sum()) for b in t.batches) for t in terms]
    parts = [n if t.count is None else t.count for n, t in zip(targets, terms, strict=True)]
    places = sum(batch.targets.numel() for _, batch in micro)
    *counts, tokens, positions = _sum(accelerator, torch.tensor([*parts, targets[0], places]))
    sums = torch.zeros(len(terms), device=accelerator.device)
    accelerator.gradient_accumulation_steps, accelerator.step = len(micro), 0
    try:
        for i, batch in ((i, batch.to(accelerator.device)) for i, batch in micro):
            with accelerator.accumulate(model):
                loss = -_weighted_sum(model, batch) / counts[i].clamp(min=1)
                sums[i] += loss.detach()
                accelerator.backward(loss * terms[i].scale * len(micro) * accelerator.num_processes)
    except torch.OutOfMemoryError:
        model.zero_grad()  # not the optimizer's, which accelerate keeps for the last micro-batch
        raise
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    grad_norm = float("nan") if norm is None else float(whole(norm))
    optimizer.step()
    optimizer.zero_grad()
    losses, skipped = _sum(accelerator, sums).tolist(), bool(getattr(optimizer, "step_was_skipped", False))
    return StepResult(losses, max(int(tokens), 1), int(positions), grad_norm, skipped)


def fits(accelerator: Accelerator, model: nn.Module, terms: Sequence[Term]) -> bool:
    """Whether all processes have memory for their micro-batches: tried without exchange, nothing is updated.

    In a step the others would wait forever for one that ran out. Twice, so that gradients are held meanwhile.
    """
    largest = max((b for term in terms for b in term.batches), key=lambda b: int((b.targets != IGNORE).sum()))
    batch, failed = largest.to(accelerator.device), 0.0
    try:
        for _ in range(2):
            with accelerator.no_sync(model):
                accelerator.backward(_weighted_sum(model, batch))
    except torch.OutOfMemoryError:
        failed = 1.0
    model.zero_grad()
    return not _sum(accelerator, torch.tensor(failed))
