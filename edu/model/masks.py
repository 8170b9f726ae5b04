"""Attention masks that keep packed documents apart, in the form that each attention implementation takes.

B batch, T time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask


def document_mask(position_ids: Int[Tensor, "B T"]) -> Tensor:
    """Return the block-diagonal causal mask (B, 1, T, T): True where a query may look; positions restart at 0 per document.

    Where positions jump back to p > 0, a further branch of the document begins: it sees itself and the first p tokens.
    """
    starts = F.pad(position_ids.diff() <= 0, (1, 0), value=True)
    places = torch.arange(position_ids.shape[-1], device=position_ids.device)
    first = torch.where(starts, places, 0).cummax(-1).values  # where each token's branch begins
    begins, document = position_ids.gather(-1, first), (position_ids == 0).cumsum(-1)
    same, before = first[:, :, None] == first[:, None, :], position_ids[:, None, :] < begins[:, :, None]
    shared = before & (document[:, :, None] == document[:, None, :])
    return (same | shared).tril()[:, None]


def mask_for(attention: str | None, position_ids: Int[Tensor, "B T"]) -> Any:
    """Return the document mask in the form that an attention implementation takes; ValueError if there is none."""
    mask = document_mask(position_ids)
    if attention in ("eager", "sdpa"):
        return mask
    if attention != "flex_attention":
        raise ValueError(f"{attention} would mix packed documents: load the model with sdpa, eager or flex_attention")
    B, _, T, _ = mask.shape  # as a tensor, flex attention would add it to the scores
    return create_block_mask(lambda b, _, q, k: mask[b, 0, q, k], B, None, T, T, device=str(mask.device))


def attend_in_quarters(attend: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    """Attend with a quarter of the queries at a time, each with the keys up to its end: 5/8 of the work if causal.

    A CPU kernel skips hidden keys only if it is told `is_causal`, and then takes no mask (docs/benchmarks.md).
    """
    T = q.shape[2]
    size = -(-T // 4)
    ends = [(start, min(start + size, T)) for start in range(0, T, size)]
    parts = [attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], mask[:, :, a:b, :b])[0] for a, b in ends]
    return torch.cat(parts, dim=1), None
