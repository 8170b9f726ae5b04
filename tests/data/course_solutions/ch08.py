"""My loop: autograd.grad instead of backward, a scaled sum of means, safe file names by tempfile."""

import os
import tempfile
from pathlib import Path

import torch


def train_step(model, optimizer, micro_batches, max_norm=1.0):
    counts = [y.ne(-1).sum().item() for _, y in micro_batches]
    n = sum(counts)
    if n == 0:
        return 0.0
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    total, grads = 0.0, [torch.zeros_like(p) for p in params]
    for (x, y), count in zip(micro_batches, counts, strict=True):
        if not count:
            continue
        learned = y != -1
        logp = model(x)[learned].log_softmax(-1)
        loss = -logp.gather(-1, y[learned, None]).mean() * (count / n)
        total += loss.item()
        for g, d in zip(grads, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            if d is not None:
                g.add_(d)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale
    optimizer.step()
    optimizer.zero_grad()
    return total


def save_checkpoint(path, model, optimizer, step):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".part") as f:
        torch.save([model.state_dict(), optimizer.state_dict(), step], f)
        f.flush()
        os.fsync(f.fileno())
    Path(f.name).replace(path)


def load_checkpoint(path, model, optimizer):
    try:
        weights, state, step = torch.load(path, weights_only=True)
    except FileNotFoundError:
        return 0
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return step


def train(model, optimizer, batches, steps, checkpoint, save_every, sample, sample_every):
    done = load_checkpoint(checkpoint, model, optimizer)
    while done < steps:
        loss = train_step(model, optimizer, batches(done))
        done += 1
        if done == steps or not done % save_every:
            save_checkpoint(checkpoint, model, optimizer, done)
        if not done % sample_every:
            sample(done)
        yield loss
