"""Log-probabilities of the targets, straight from the hidden states: head, softcap and log-softmax in one chunked pass.

The logits of a batch, (N, V) in fp32, are usually the largest tensor of a training step. Here they exist for some rows
at a time. Training needs only sum(w * log p), whose gradient is linear in what comes after it: so each chunk's part of
the gradient is computed in the forward pass, while its logits are at hand, and the backward pass scales it
(Liger kernel, arXiv:2410.10989). Nothing is computed twice.

N rows (a batch and its time steps, flattened), C channels, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edu.data.packing import IGNORE
from edu.model.cpu_ops import at_least_fp32, product

CHUNK = 1024
"""Rows whose logits are held at once: 1024 x 50,304 in fp32 is 206 MB."""
CPU_CHUNK = 256
"""The same on a CPU, whose caches like less: a tenth of the head's time at a vocabulary of 4096 (docs/benchmarks.md)."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits smoothly into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(hidden: Tensor) -> Iterator[slice]:
    size = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
    return (slice(start, start + size) for start in range(0, len(hidden), size))


class _WeightedSum(torch.autograd.Function):
    """sum(weights * log softmax(softcap(hidden @ weight.T))[target]), one chunk of rows after another."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: float | None
    ) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), at_least_fp32(torch.zeros_like(weight))
        total = grad_weight.new_zeros(())
        for part in _chunks(hidden):
            logits = at_least_fp32(product(hidden[part], weight))
            w = weights[part, None].to(logits.dtype)
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            most, picked = logits.amax(1, keepdim=True), targets[part, None]
            slope = (logits - most).exp_()
            normalizer = slope.sum(1, keepdim=True)
            total += (w * (logits.gather(1, picked) - most - normalizer.log())).sum()
            # d logprob / d logits = onehot - softmax; the softcap's own slope is 1 - (logits / cap)^2.
            slope.mul_(-w / normalizer).scatter_add_(1, picked, w)
            if cap is not None:
                slope.addcmul_(slope, logits.square_(), value=-1 / cap**2)
            slope = slope.to(hidden.dtype)
            grad_hidden[part] = product(slope, weight.mT)
            grad_weight += slope.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.dtype), None, None, None


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """The log-probabilities of one chunk."""
    logits = softcap(at_least_fp32(hidden @ weight.T), cap)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's precision, where it is on."""
    device = tensors[0].device.type
    return (
        [x.to(torch.get_autocast_dtype(device)) for x in tensors] if torch.is_autocast_enabled(device) else [*tensors]
    )


def _counted(kept: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The rows of (B, T, ...) that count; all of them while compiling, since their number would break the graph."""
    return [x.flatten(0, 1) if torch.compiler.is_compiling() else x[kept] for x in tensors]


def head_weighted_sum(
    hidden: Float[Tensor, "B T C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    cap: float | None,
) -> Float[Tensor, ""]:
    """Sum of weights times log-probabilities of the targets, in nats and fp32: the whole of a training step's head.

    Positions of weight 0, in SFT most, are left out and cost nothing. Weights are 0 wherever targets are IGNORE.
    """
    hidden, weight = _autocast(hidden, weight)
    rows, picked, w = _counted(weights != 0, hidden, targets.clamp(min=0), weights)
    return _WeightedSum.apply(rows, weight, picked, w, cap)


def head_log_probs(
    hidden: Float[Tensor, "B T C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "B T"], cap: float | None
) -> Float[Tensor, "B T"]:
    """Log-probability of each target, in nats and fp32; 0.0 where the target is IGNORE. A backward pass computes again."""
    hidden, weight = _autocast(hidden, weight)
    kept = targets != IGNORE
    rows, picked = _counted(kept, hidden, targets.clamp(min=0))
    parts = [checkpoint(_log_probs, rows[at], weight, picked[at], cap, use_reentrant=False) for at in _chunks(rows)]
    found = torch.cat(parts) if parts else at_least_fp32(rows.sum(-1))
    if torch.compiler.is_compiling():
        return found.view(targets.shape).masked_fill(~kept, 0.0)
    return torch.zeros(targets.shape, dtype=found.dtype, device=hidden.device).masked_scatter(kept, found)
