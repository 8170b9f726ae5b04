"""My block: complex rotation, fused attention, one set of einsums."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def rms_norm(x, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotary_angles(positions, head_dim, theta):
    exponents = torch.linspace(0, 1, head_dim // 2 + 1, device=positions.device)[:-1]
    angles = torch.einsum("...t,i->...ti", positions.float(), torch.pow(theta, -exponents))
    unit = torch.polar(torch.ones_like(angles), angles)
    return unit.real, unit.imag


def apply_rotary_emb(x, cos, sin):
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].float(), x[..., half:].float()) * torch.complex(cos, -sin)
    return torch.cat([pairs.real, pairs.imag], dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c = config
        width = config.head_dim * config.num_key_value_heads
        self.q_proj, self.o_proj = (nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(2))

    def forward(self, x, positions=None, mask=None):
        c = self.c
        split = (-1, c.head_dim)
        q, k, v = (p(x).unflatten(-1, split) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, D)
        if positions is None:
            positions = torch.arange(x.size(1), device=x.device)
        cos, sin = rotary_angles(positions, c.head_dim, c.rope_theta)
        # heads stand before D here, so every angle needs an axis for them
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        q, k = (rms_norm(apply_rotary_emb(z, cos, sin), c.rms_norm_eps) for z in (q, k))
        q, k, v = (z.movedim(2, 1) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.movedim(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h * h.clamp(min=0))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.eps = config.rms_norm_eps

    def forward(self, x, positions=None, mask=None):
        h = x + self.self_attn(rms_norm(x, self.eps), positions=positions, mask=mask)
        return h + self.mlp(rms_norm(h, self.eps))
