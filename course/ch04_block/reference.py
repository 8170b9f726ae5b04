"""edu's block under the names of chapter 4."""

from typing import Any

import torch
from torch import Tensor

from edu.model import gpt
from edu.model.config import GPTConfig
from edu.model.gpt import MLP, apply_rotary_emb

__all__ = ["MLP", "Block", "CausalSelfAttention", "Config", "apply_rotary_emb", "rms_norm", "rotary_angles"]


class Config(GPTConfig):
    """A configuration of the chapter's sizes, with the eager attention, which takes any mask."""

    def __init__(self, **sizes: Any) -> None:
        small = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        super().__init__(**{**small, **sizes}, attn_implementation="eager")


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return gpt.rms_norm(x, eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """edu's angles have a dimension for the heads, (B, 1, T, D/2), which the chapter leaves to the attention."""
    config = Config(hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    cos, sin = gpt.rotary_angles(positions.reshape(-1, positions.shape[-1]), config)
    return tuple(each.reshape(*positions.shape, -1) for each in (cos, sin))


def _arguments(config: GPTConfig, x: Tensor, positions: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    B, T, _ = x.shape
    places = torch.arange(T) if positions is None else positions
    return {"cos_sin": gpt.rotary_angles(places.expand(B, T), config), "attention_mask": mask}


class CausalSelfAttention(gpt.CausalSelfAttention):
    def __init__(self, config: GPTConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, **_arguments(self.config, x, positions, mask))[0]


class Block(gpt.Block):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if positions is None and mask is None:
            return super().forward(x)
        return super().forward(x, **_arguments(self.config, x, positions, mask))
