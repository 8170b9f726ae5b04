"""My engine."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course.ch04_block.solution import MLP, Config, apply_rotary_emb, rms_norm, rotary_angles


class KVCache:
    def __init__(self, batch_size, n_layer, n_kv_head, max_seq_len, head_dim):
        self.tensor = torch.zeros(batch_size, n_layer, 2, n_kv_head, max_seq_len, head_dim)
        self.length = 0

    def insert_kv(self, layer, k, v):
        end = self.length + k.size(2)
        self.tensor[:, layer].narrow(-2, self.length, k.size(2)).copy_(torch.stack([k, v], dim=1))
        everything = self.tensor[:, layer, :, :, :end]
        if layer + 1 == self.tensor.size(1):
            self.length = end
        return everything.unbind(1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, cache=None, layer=0):
        c, T = self.config, x.size(1)
        past = 0 if cache is None else cache.length
        pos = torch.arange(past, past + T)
        cos, sin = rotary_angles(pos, c.head_dim, c.rope_theta)
        q, k, v = (
            p(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rms_norm(apply_rotary_emb(q, cos, sin), c.rms_norm_eps)
        k = rms_norm(apply_rotary_emb(k, cos, sin), c.rms_norm_eps)
        if cache is not None:
            k, v = cache.insert_kv(layer, k, v)
        seen = torch.arange(k.size(2)) <= pos[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A small language model around the attention; complete, nothing to fill in."""

    def __init__(self, config: Config, vocabulary: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(vocabulary, config.hidden_size)
        self.attentions = nn.ModuleList(CausalSelfAttention(config) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(config) for _ in range(layers))
        self.head = nn.Linear(config.hidden_size, vocabulary, bias=False)

    def forward(self, ids, cache=None):
        """(B, T) -> logits (B, T, V)."""
        x = self.embed(ids)
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(rms_norm(x), cache, layer)
            x = x + mlp(rms_norm(x))
        return self.head(rms_norm(x))

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Return an empty cache for this model."""
        config = self.config
        return KVCache(batch_size, self.layers, config.num_key_value_heads, max_seq_len, config.head_dim)


@torch.inference_mode()
def generate_naive(model, prompt, max_new_tokens):
    ids = torch.tensor([prompt])
    for _ in range(max_new_tokens):
        ids = torch.hstack([ids, model(ids)[:, -1:].argmax(-1)])
    return ids[0, len(prompt) :].tolist()


class Engine:
    """One row a sample; rows that have ended leave the batch."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, num_samples=1, temperature=0.0, stop_tokens=(), seed=0):
        generators = [np.random.default_rng((seed, i)) for i in range(num_samples)]
        one = self.model.make_cache(1, len(prompt) + max_new_tokens)
        logits = self.model(torch.tensor([prompt]), one)[:, -1].expand(num_samples, -1)
        cache = self.model.make_cache(num_samples, len(prompt) + max_new_tokens)
        cache.tensor = one.tensor.repeat_interleave(num_samples, dim=0)
        cache.length = one.length
        out = [[] for _ in range(num_samples)]
        live = list(range(num_samples))
        for step in range(max_new_tokens):
            nxt = [self.pick(row, temperature, generators[i]) for row, i in zip(logits, live, strict=True)]
            for i, t in zip(live, nxt, strict=True):
                out[i].append(t)
            keep = [j for j, t in enumerate(nxt) if t not in stop_tokens]
            if not keep or step + 1 == max_new_tokens:
                break
            if len(keep) < len(live):
                cache.tensor = cache.tensor[keep]
                live, nxt = [live[j] for j in keep], [nxt[j] for j in keep]
            logits = self.model(torch.tensor(nxt)[:, None], cache)[:, -1]
        return out

    @staticmethod
    def pick(logits, temperature, generator):
        if temperature == 0:
            return int(logits.argmax())
        # Gumbel's trick: the argmax of logits plus noise is a draw from softmax
        p = (logits.double() / temperature).softmax(-1).numpy()
        return int(generator.choice(len(p), p=p / p.sum()))
