"""Products with weights, and the precision of what is summed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edu.model.fast_path import accelerated


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen half precision to fp32; fp32 and fp64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@accelerated
def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T, (..., I) and (O, I) -> (..., O), or of as many pairs as a first dimension has. No gradient."""
    return x @ weight.mT


@accelerated
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T with gradients, (..., I) and (O, I) -> (..., O)."""
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)
