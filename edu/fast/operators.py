"""RMS norm, squared ReLU and linear layers with gradients derived by hand: the same values in less time.

On a CPU most of a norm's time is reading and writing the tensor: what is here keeps one tensor and passes over it once in
the backward pass. A linear layer's time is its products, which MKL computes slowly on some processors. Each function has
a readable namesake in edu/model, which says what it computes.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    widened = x.to(torch.promote_types(x.dtype, torch.float32))
    if not torch.is_grad_enabled():  # one operator instead of five: at a token a step their number is the time
        return F.rms_norm(widened, widened.shape[-1:], eps=eps).type_as(x)
    return _RMSNorm.apply(widened, eps).type_as(x)


def relu_squared(x: Tensor) -> Tensor:
    return _ReLUSquared.apply(x) if torch.is_grad_enabled() else x.relu().square_()


# On other processors torch has better (Apple's own) or was not measured. Asked here: it would break a compiled graph.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)
ROWS = 256
"""oneDNN keeps a program of about a megabyte for each number of rows: only multiples of so many go there."""


@torch.library.custom_op("edu::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T; a torch operator of its own, which a compiler takes as it is."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def by_onednn(x: Tensor) -> bool:
    """Return True where the product of these rows with a matrix is oneDNN's: many rows, fp32, on a CPU."""
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[:-1].numel() % ROWS == 0


def product(x: Tensor, weight: Tensor) -> Tensor:
    # Same sums in another order. On an AMD EPYC oneDNN is 2.3 times as fast as MKL, which is torch's choice
    # (docs/LOG.md, 2026-11-24); torch has no public way to ask for it.
    if weight.ndim == 3:  # as many pairs as the first dimension has
        return torch.stack(list(map(onednn_product, x, weight))) if by_onednn(x[0]) else x @ weight.mT
    return onednn_product(x, weight) if by_onednn(x) and weight.dtype == torch.float32 else x @ weight.mT


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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    # Only where it trains: elsewhere the logits stay nearest to stock's.
    faster = torch.is_grad_enabled() and by_onednn(x) and not torch.is_autocast_enabled("cpu")
    return _Linear.apply(x, weight) if faster else F.linear(x, weight)
