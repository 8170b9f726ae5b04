"""Chapter 4: the modern transformer block. Fill in the bodies; `make grade CHALLENGE=4` says what holds.

B rows, T positions, C channels, H query heads, K key/value heads, D channels of a head.
The names of the weights (q_proj, k_proj, v_proj, o_proj, fc1, fc2) are those of transformers' `nanochat`: keep them,
and a model trained with your block opens in stock transformers.
"""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a block."""

    hidden_size: int = 64
    """C"""
    num_attention_heads: int = 4
    """H"""
    num_key_value_heads: int = 2
    """K; divides H"""
    intermediate_size: int = 256
    """Channels between the two matrices of the MLP."""
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """D"""
        return self.hidden_size // self.num_attention_heads


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension of x so that the mean of its squares is 1; no weights. Same shape."""
    raise NotImplementedError


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles: (T,) or (B, T) -> (..., D/2) each.

    The angle of pair i at position p is p * theta^(-2i / D).
    """
    raise NotImplementedError


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by minus its angle; (..., T, D) -> the same shape.

    first' = first * cos + second * sin, second' = second * cos - first * sin.
    """
    raise NotImplementedError


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with rotary embeddings and QK norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C).

        positions: (B, T) or (T,) integers; None means 0, 1, 2, ...
        mask: (B, 1, T, T) booleans, True where a query (third index) may see a key (fourth); None means causal.
        """
        raise NotImplementedError


class MLP(nn.Module):
    """Two matrices, fc1 and fc2, with relu(x)^2 between them; no biases."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        raise NotImplementedError


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the two are called self_attn and mlp."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); positions and mask as in the attention."""
        raise NotImplementedError
