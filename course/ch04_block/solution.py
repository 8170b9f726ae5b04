"""The plain solution of chapter 4: a transformer block with RoPE, QK norm, GQA and relu^2."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device) / head_dim)  # (D/2,)
    angles = positions[..., None] * frequencies  # (..., T, D/2)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        config, D = self.config, self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)
        positions = torch.arange(T, device=x.device) if positions is None else positions
        cos, sin = rotary_angles(positions, D, config.rope_theta)  # (T, D/2) or (B, T, D/2)
        if cos.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D/2): the same for all heads
        q = rms_norm(apply_rotary_emb(q, cos, sin), config.rms_norm_eps)
        k = rms_norm(apply_rotary_emb(k, cos, sin), config.rms_norm_eps)
        groups = config.num_attention_heads // config.num_key_value_heads
        k = k.repeat_interleave(groups, dim=1)  # (B, H, T, D): heads 0 .. groups-1 share the first
        v = v.repeat_interleave(groups, dim=1)
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        scores = q @ k.mT * D**-0.5  # (B, H, T, T)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu().square())


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(rms_norm(x, self.eps), positions, mask)
        return x + self.mlp(rms_norm(x, self.eps))
