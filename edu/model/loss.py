"""Log-probabilities of the targets, straight from the hidden states: head, softcap and log-softmax in one chunked pass.

The logits of a batch, (N, V) in fp32, are usually the largest tensor of a training step. Here they exist for some rows
at a time. Training needs only sum(w * log p), whose gradient is linear in what comes after it: so each chunk's part of
the gradient is computed in the forward pass, while its logits are at hand, and the backward pass scales it
(Liger kernel, arXiv:2410.10989). Nothing is computed twice.

N rows (a batch and its time steps, flattened), C channels, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from edu.model.linear import at_least_fp32, product

CHUNK = 1024
"""Rows whose logits are held at once: 1024 x 50,304 in fp32 is 206 MB."""
CPU_CHUNK = 256
"""The same on a CPU, whose caches hold less (docs/benchmarks.md)."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits smoothly into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


# One operator to a compiler: inside a compiled graph it would unroll this loop, 64 times for a large batch.
@torch.library.custom_op("edu::head_log_probs", mutates_args=())
def chunked_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities (N) of the targets; with `weights`, also the gradients of sum(weights * log p).

    p = softmax(z) with z = cap * tanh(hidden @ weight.T / cap). For each chunk of rows:
    1. Compute z (chunk, V), and log p of the target as z[target] - logsumexp(z).
    2. d log p / dz = onehot(target) - softmax(z), and the softcap's slope is dz / d(hidden @ weight.T) = 1 - (z / cap)^2.
    3. Multiply by hidden and weight for the two gradients.
    """
    log_probs = at_least_fp32(hidden.new_empty(len(hidden)))
    grad_hidden = torch.empty_like(hidden) if weights is not None else hidden.new_empty(0)
    grad_weight = at_least_fp32(torch.zeros_like(weight)) if weights is not None else log_probs.new_empty(0)
    size = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
    for start in range(0, len(hidden), size):
        at = slice(start, start + size)
        logits = at_least_fp32(product(hidden[at], weight))  # (chunk, V)
        if cap is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        most, target = logits.amax(1, keepdim=True), targets[at, None]
        slope = (logits - most).exp_()
        normalizer = slope.sum(1, keepdim=True)
        log_probs[at] = (logits.gather(1, target) - most - normalizer.log())[:, 0]
        if weights is None:
            continue
        w = weights[at, None].to(logits.dtype)
        slope.mul_(-w / normalizer).scatter_add_(1, target, w)
        if cap is not None:
            slope.addcmul_(slope, logits.square_(), value=-1 / cap**2)
        slope = slope.to(hidden.dtype)
        grad_hidden[at] = product(slope, weight.mT)
        grad_weight += slope.T @ hidden[at]
    return log_probs, grad_hidden, grad_weight


@chunked_log_probs.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    del targets, cap
    log_probs = at_least_fp32(hidden.new_empty(hidden.shape[0]))
    if weights is None:
        return log_probs, hidden.new_empty(0), log_probs.new_empty(0)
    return log_probs, torch.empty_like(hidden), at_least_fp32(torch.empty_like(weight))


class _WeightedSum(torch.autograd.Function):
    """Weighted sum of log-probabilities; the forward pass computes its gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: float | None
    ) -> Tensor:
        log_probs, grad_hidden, grad_weight = chunked_log_probs(hidden, weight, targets, weights, cap)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return (weights.to(log_probs.dtype) * log_probs).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.dtype), None, None, None


class _LogProbs(torch.autograd.Function):
    """Log-probability of each row; the backward pass computes the logits again, with the incoming gradients as weights."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.cap = cap
        return chunked_log_probs(hidden, weight, targets, None, cap)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        _, grad_hidden, grad_weight = chunked_log_probs(hidden, weight, targets, grads[0], ctx.cap)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in autocast's precision, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return [*tensors]
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _select(kept: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Flatten (B, T, ...) to the rows that count; to all rows while compiling, since their number would break the graph."""
    return [x.flatten(0, 1) if torch.compiler.is_compiling() else x[kept] for x in tensors]


def head_weighted_sum(
    hidden: Float[Tensor, "B T C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    cap: float | None,
) -> Float[Tensor, ""]:
    """Return the sum of weights times log-probabilities of the targets, in nats and fp32: the head of a training step.

    Zero-weight positions (most of them in SFT) are skipped. Weights are 0 wherever targets are negative.
    """
    hidden, weight = _autocast(hidden, weight)
    rows, target, w = _select(weights != 0, hidden, targets.clamp(min=0), weights)
    return _WeightedSum.apply(rows, weight, target, w, cap)


def head_log_probs(
    hidden: Float[Tensor, "B T C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "B T"], cap: float | None
) -> Float[Tensor, "B T"]:
    """Return the log-probability of each target, in nats and fp32; 0.0 where the target is negative."""
    hidden, weight = _autocast(hidden, weight)
    kept = targets >= 0
    rows, target = _select(kept, hidden, targets.clamp(min=0))
    found = _LogProbs.apply(rows, weight, target, cap)
    if torch.compiler.is_compiling():
        return found.view(targets.shape).masked_fill(~kept, 0.0)
    return torch.zeros(targets.shape, dtype=found.dtype, device=hidden.device).masked_scatter(kept, found)
