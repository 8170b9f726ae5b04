"""Log-probabilities of the targets, straight from the hidden states: head, softcap and log-softmax in one chunked pass.

The logits of a batch, (N, V) in fp32, are usually the largest tensor of a training step. Here they exist for CHUNK rows
at a time, in the forward and again in the backward pass, which recomputes them: one matrix product more, and no memory.

N rows (a batch and its time steps, flattened), C channels, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from edu.fused import at_least_fp32
from edu.packing import IGNORE

CHUNK = 1024
"""Rows whose logits are held at once: 1024 x 50,304 in fp32 is 206 MB."""


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Squash logits smoothly into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


def _logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """Softcapped logits of a chunk, in a tensor of their own that may be overwritten."""
    logits = at_least_fp32(hidden @ weight.T)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(softcap(hidden @ weight.T))[target], one chunk of rows after another."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        normalizers = at_least_fp32(hidden.new_empty(len(targets)))
        picked = torch.empty_like(normalizers)
        for part in _chunks(len(targets)):
            logits = _logits(hidden[part], weight, cap)
            normalizers[part] = logits.logsumexp(1)
            picked[part] = logits.gather(1, targets[part, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.cap = cap
        return picked - normalizers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), at_least_fp32(torch.zeros_like(weight))
        for part in _chunks(len(targets)):
            logits = _logits(hidden[part], weight, ctx.cap)
            # d logprob / d logits = onehot - softmax; the softcap's own slope is 1 - (logits / cap)^2.
            slope = (logits - normalizers[part, None]).exp_().neg_()
            slope[torch.arange(len(slope), device=slope.device), targets[part]] += 1
            slope *= grads[0][part, None]
            if ctx.cap is not None:
                slope.addcmul_(slope, logits.square_(), value=-1 / ctx.cap**2)
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
    if torch.compiler.is_compiling():  # how many are kept depends on the data, and would break the graph
        every = _HeadLogProbs.apply(hidden.flatten(0, 1), weight, targets.clamp(min=0).flatten(), cap)
        return every.view(targets.shape).masked_fill(~kept, 0.0)
    found = _HeadLogProbs.apply(hidden[kept], weight, targets[kept], cap)
    logprobs = torch.zeros(targets.shape, dtype=found.dtype, device=hidden.device)
    return logprobs.masked_scatter(kept, found)
