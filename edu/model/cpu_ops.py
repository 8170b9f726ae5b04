"""RMS norm, squared ReLU and linear layers with their derivatives written by hand: the same values in less time.

On a CPU most of a norm's time is reading and writing the tensor: what is here keeps one tensor and passes over it once in
the backward pass. A linear layer's time is its products, which MKL computes slowly on some processors.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision widened to fp32; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = torch.rsqrt(mean_square + eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        along = (grads[0] * y).mean(-1, keepdim=True)
        return torch.addcmul(grads[0], y, along, value=-1).mul_(scale), None


class _ReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (r,) = ctx.saved_tensors
        return (r * grads[0]).mul_(2)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit mean square, in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467); no weights."""
    return _RMSNorm.apply(at_least_fp32(x), eps).type_as(x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv:2109.08668)."""
    return _ReLUSquared.apply(x)


ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
"""On other processors torch has better (Apple's own) or was not measured. Asked here: it would break a compiled graph."""
ROWS = 256
"""oneDNN keeps a program of about a megabyte for each number of rows: only multiples of so many go there."""


@torch.library.custom_op("edu::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T; a torch operator of its own, which a compiler takes as it is."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, (..., I) and (O, I) -> (..., O), without a derivative: much fp32 on a CPU by oneDNN, else as torch does.

    Same sums in another order. On an AMD EPYC oneDNN is 2.3 times as fast as MKL, which is torch's choice (docs/LOG.md,
    2026-11-24); torch has no public way to ask for it.
    """
    return onednn_product(x, weight) if by_onednn(x) and weight.dtype == torch.float32 else x @ weight.mT


def by_onednn(x: Tensor) -> bool:
    """Whether the product of these rows with a matrix goes there."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[:-1].numel() % ROWS == 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, outputs = x.flatten(0, -2), grads[0].flatten(0, -2)
        in_weight = onednn_product(outputs.mT, rows.mT)
        return product(grads[0], weight.mT), in_weight


class Linear(nn.Linear):
    """A linear layer without bias, by the faster product where it trains; elsewhere the logits stay nearest to stock's."""

    def forward(self, input: Tensor) -> Tensor:
        faster = torch.is_grad_enabled() and by_onednn(input) and not torch.is_autocast_enabled("cpu")
        return _Linear.apply(input, self.weight) if faster else super().forward(input)
