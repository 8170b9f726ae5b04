"""Chapter 8: the SFT loop. Fill in the bodies; `make grade CHALLENGE=8` says what holds.

A batch is (inputs, targets), (B, T) int64 each; a target of -1 does not count. model(inputs) gives logits (B, T, V).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch], max_norm: float = 1.0
) -> float:
    """Make one update from several micro-batches, as if they were one batch; return its loss.

    1. N: the number of targets that count, in all micro-batches together.
    2. For each micro-batch: the sum of -log p of its targets, divided by N; backward. Gradients add up.
    3. Clip the norm of the whole gradient to max_norm, then one step of the optimizer.
    4. The next step starts with gradients of zero. Where N is 0 nothing changes, and the loss is 0.0.
    """
    raise NotImplementedError


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write all that the next step depends on, so that a crash at any moment leaves the old file or the new one.

    Write to another name first, then rename: Path.replace is atomic.
    """
    raise NotImplementedError


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bring model and optimizer to where save_checkpoint found them; return the step, 0 if there is no file."""
    raise NotImplementedError


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], list[Batch]],
    steps: int,
    checkpoint: Path,
    save_every: int,
    sample: Callable[[int], None],
    sample_every: int,
) -> Iterator[float]:
    """Yield the loss of every step from where the checkpoint stands to `steps`.

    batches(step) gives the micro-batches of step 0, 1, ..., so a step's data depend on its number alone.
    After every `sample_every`-th step (counted 1, 2, ...) call sample(number of steps made); after every
    `save_every`-th and after the last, save. Saving comes before sampling: a crash in sample loses nothing.
    """
    raise NotImplementedError
