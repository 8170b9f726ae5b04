"""Log-probabilities of the targets, straight from the hidden states: head, softcap and log-softmax in one chunked pass.

The logits of a batch, (N, V) in fp32, are usually the largest tensor of a training step. Here they exist for CHUNK rows
at a time, in the forward and again in the backward pass, which recomputes them: one matrix product more, and no memory.

N rows (a batch and its time steps, flattened), C channels, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from edu.packing import IGNORE

CHUNK = 1024
"""Rows whose logits are held at once: 1024 x 50,304 in fp32 is 206 MB."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits smoothly into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision widened to fp32; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(softcap(hidden @ weight.T))[target], one chunk of rows after another."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.cap = cap
        logprobs = at_least_fp32(hidden.new_empty(len(targets)))
        for part in _chunks(len(targets)):
            logits = softcap(at_least_fp32(hidden[part] @ weight.T), cap)
            picked = logits.gather(1, targets[part, None]).squeeze(1)
            logprobs[part] = picked - logits.logsumexp(1)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), at_least_fp32(torch.zeros_like(weight))
        for part in _chunks(len(targets)):
            logits = softcap(at_least_fp32(hidden[part] @ weight.T), ctx.cap)
            # d logprob / d logits = onehot - softmax; the softcap's own slope is 1 - (logits / cap)^2.
            slope = -logits.softmax(1)
            slope[torch.arange(len(slope), device=slope.device), targets[part]] += 1
            slope *= grads[0][part, None]
            if ctx.cap is not None:
                slope *= 1 - (logits / ctx.cap).square_()
            slope = slope.to(hidden.dtype)
            grad_hidden[part] = slope @ weight
            grad_weight += slope.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def head_log_probs(
    hidden: Float[Tensor, "B T C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "B T"], cap: float | None
) -> Float[Tensor, "B T"]:
    """Log-probability of each target, in nats and fp32; 0.0 where the target is IGNORE.

    1. Keep the positions that are trained: in SFT most are not, and cost nothing here.
    2. Per chunk: logits, softcap, log-softmax, pick the target's.
    3. Put the results back into (B, T).
    """
    kept = targets != IGNORE
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    found = _HeadLogProbs.apply(hidden[kept], weight, targets[kept], cap)
    logprobs = torch.zeros(targets.shape, dtype=found.dtype, device=hidden.device)
    return logprobs.masked_scatter(kept, found)
