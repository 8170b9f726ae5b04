"""One optimizer step, for every stage: loss = sum(w * -log p) / N, whatever the split into batches and processes.

w is what the stages differ in (`Batch.weights`): 1 in pretraining, the assistant's mask in SFT, advantage A times mask
in RL. N counts the targets that are not -1 (or what a term counts instead) over all micro-batches and all processes of the
step. Dividing by each micro-batch's own count would weigh tokens by how empty their neighbors are: the mean of means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from edu.data.packing import IGNORE, Batch
from edu.training.optimizer import MuonAdamW, whole


class OutOfMemory(Exception):
    """Memory ran out in a forward or backward pass; model and optimizer are as before the step."""


@dataclass(frozen=True)
class Term:
    """One weighted term of the loss: this process's micro-batches and a coefficient."""

    batches: Sequence[Batch]
    scale: float = 1.0
    left_out: int = 0
    """Targets of weight 0 left out of the batches, since their gradient is zero: counted in `tokens`, in N unless `count` is given."""
    count: int | None = None
    """Part of N of this process, where that is not its number of targets."""

    def split(self, parts: int) -> "Term":
        """Return the same term in micro-batches of a parts-th of the rows, the last ones perhaps empty."""
        return replace(self, batches=[part for batch in self.batches for part in batch.split(parts)])


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, over all processes."""

    losses: list[float]
    """Loss of each term, nats per target."""
    tokens: int
    """Targets of the first term."""
    positions: int
    """Positions computed, those without a target included: what the FLOPs are counted from."""
    row_length: float
    """Length of the rows that were computed, a mean over their positions."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    skipped: bool
    """True where nothing was updated: no target had a weight, or fp16 overflowed."""


def _sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum over all processes, on the device."""
    total = accelerator.reduce(values.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total


def _weighted_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Return sum(w * log p) of a micro-batch, a scalar.

    The loss is minus this. So its gradient is sum(w * -grad log p), and where w is an advantage A, a step down that
    gradient makes the sampled tokens more probable where A > 0 and less where A < 0: REINFORCE.
    """
    return model(batch.inputs, targets=batch.targets, weights=batch.weights, position_ids=batch.positions)


@contextmanager
def _noticing_out_of_memory(model: nn.Module) -> Iterator[None]:
    """Turn errors of an exhausted device into OutOfMemory, without the gradients that there were."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        model.zero_grad()  # not the optimizer's, which accelerate keeps for the last micro-batch
        raise OutOfMemory from None


def train_step(
    accelerator: Accelerator, model: nn.Module, optimizer: MuonAdamW, terms: Sequence[Term], clip: float = 1.0
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip, update. Every process must bring the same number of micro-batches.

    1. Add up N of each term over all processes. Where no target anywhere has a weight, skip the update: momentum
       would move the weights without any gradient.
    2. Backward each micro-batch, scaled so that accelerate's mean over micro-batches and DDP's or FSDP's over processes cancel.
    3. Clip and update once, after the last one.

    OutOfMemory leaves model and optimizer as they were; an error in 3 does not.
    """
    # 1. Count on this process, then sum over all: N of each term, targets, weighted targets, positions, their row lengths.
    micro = [(i, batch) for i, term in enumerate(terms) for batch in term.batches]
    targets = [t.left_out + sum(int((b.targets != IGNORE).sum()) for b in t.batches) for t in terms]
    parts = [n if t.count is None else t.count for n, t in zip(targets, terms, strict=True)]
    weighed = sum(int((batch.weights != 0).sum()) for i, batch in micro if terms[i].scale)
    shapes = [batch.targets.shape for _, batch in micro]
    places, squares = sum(B * T for B, T in shapes), sum(B * T * T for B, T in shapes)
    totals = _sum(accelerator, torch.tensor([*parts, targets[0], weighed, places, squares]))
    *counts, tokens, weighed, positions, squares = totals
    tokens, row_length = max(int(tokens), 1), float(squares) / max(int(positions), 1)
    if not weighed:
        return StepResult([0.0] * len(terms), tokens, 0, row_length, 0.0, skipped=True)
    # 2. accelerate divides each loss by gradient_accumulation_steps, and DDP and FSDP average over processes: the two
    # factors turn both back into sums. `step = 0` restarts its count, so only the last micro-batch synchronizes.
    sums = torch.zeros(len(terms), device=accelerator.device)
    accelerator.gradient_accumulation_steps, accelerator.step = len(micro), 0
    with _noticing_out_of_memory(model):
        for i, batch in ((i, batch.to(accelerator.device)) for i, batch in micro):
            with accelerator.accumulate(model):
                # The minus of -w log p, for every stage. In RL w is the advantage: where it is positive the step makes
                # the token more likely, where it is negative less.
                loss = -_weighted_sum(model, batch) / counts[i].clamp(min=1)
                sums[i] += loss.detach()
                accelerator.backward(loss * terms[i].scale * len(micro) * accelerator.num_processes)
    # 3. One norm and one update, of the sum of all micro-batches.
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    grad_norm = float("nan") if norm is None else float(whole(norm))
    optimizer.step()
    optimizer.zero_grad()
    losses, skipped = _sum(accelerator, sums).tolist(), bool(getattr(optimizer, "step_was_skipped", False))
    return StepResult(losses, tokens, int(positions), row_length, grad_norm, skipped)


def fits(accelerator: Accelerator, model: nn.Module, terms: Sequence[Term]) -> bool:
    """Return whether all processes have memory for their largest micro-batch, without communication or update.

    Called apart from a step, because there the others would wait forever for a process that failed. Two passes: the
    second runs while the first's gradients take memory.
    """
    batches = [batch for term in terms for batch in term.batches]
    largest = max(batches, key=lambda b: (b.targets.numel(), int((b.targets != IGNORE).sum())))
    batch, failed = largest.to(accelerator.device), 0.0
    try:
        with _noticing_out_of_memory(model):
            for _ in range(2):
                with accelerator.no_sync(model):
                    accelerator.backward(_weighted_sum(model, batch))
    except OutOfMemory:
        failed = 1.0
    model.zero_grad()
    return not _sum(accelerator, torch.tensor(failed))
