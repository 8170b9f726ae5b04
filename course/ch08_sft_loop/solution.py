"""The plain solution of chapter 8: accumulate, clip, step; save, resume, sample."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch], max_norm: float = 1.0
) -> float:
    N = sum(int((targets != -1).sum()) for _, targets in micro_batches)
    if N == 0:
        return 0.0
    optimizer.zero_grad()
    loss = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs).flatten(0, 1)  # (B T, V)
        part = cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum") / N
        part.backward()
        loss += part.item()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


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
    for step in range(load_checkpoint(checkpoint, model, optimizer), steps):
        loss = train_step(model, optimizer, batches(step))
        done = step + 1
        if done % save_every == 0 or done == steps:
            save_checkpoint(checkpoint, model, optimizer, done)
        if done % sample_every == 0:
            sample(done)
        yield loss
