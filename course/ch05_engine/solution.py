"""The plain solution of chapter 5: attention through a cache, prefill and decode."""

import torch
from torch import Tensor, nn

from course.ch04_block.solution import MLP, Config, apply_rotary_emb, rms_norm, rotary_angles


class KVCache:
    """Keys and values of every position read so far, in one tensor that is allocated once."""

    def __init__(self, batch_size: int, n_layer: int, n_kv_head: int, max_seq_len: int, head_dim: int) -> None:
        """Make `self.tensor`, (B, n_layer, 2, n_kv_head, max_seq_len, head_dim), and `self.length` = 0."""
        self.tensor = torch.zeros(batch_size, n_layer, 2, n_kv_head, max_seq_len, head_dim)
        self.length = 0

    def insert_kv(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer, (B, K, T, D) each; return all of that layer so far, (B, K, S, D).

        All layers of one forward pass write at the same positions: `length` moves when the last layer has written.
        """
        end = self.length + k.shape[2]
        self.tensor[:, layer, 0, :, self.length : end] = k
        self.tensor[:, layer, 1, :, self.length : end] = v
        if layer == self.tensor.shape[1] - 1:
            self.length = end
        return self.tensor[:, layer, 0, :, :end], self.tensor[:, layer, 1, :, :end]


class CausalSelfAttention(nn.Module):
    """Chapter 4's attention, which now also writes to a cache and reads from it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x holds the positions length, length + 1, ... only.

        1. Rotate by the positions that x really has.
        2. Insert the new keys and values; attend to all that come back.
        3. Query t of the new ones sees every cached position, and the new ones up to itself.
        """
        B, T, _ = x.shape
        config, D = self.config, self.config.head_dim
        q, k, v = (proj(x).view(B, T, -1, D).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        start = 0 if cache is None else cache.length
        cos, sin = rotary_angles(torch.arange(start, start + T), D, config.rope_theta)
        q = rms_norm(apply_rotary_emb(q, cos, sin))
        k = rms_norm(apply_rotary_emb(k, cos, sin))
        if cache is not None:
            k, v = cache.insert_kv(layer, k, v)  # (B, K, S, D)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = torch.ones(T, k.shape[2], dtype=torch.bool).tril(start)  # query t stands at position start + t
        weights = (q @ k.mT * D**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(B, T, -1))


class GPT(nn.Module):
    """A small language model around the attention; complete, nothing to fill in."""

    def __init__(self, config: Config, vocabulary: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(vocabulary, config.hidden_size)
        self.attentions = nn.ModuleList(CausalSelfAttention(config) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(config) for _ in range(layers))
        self.head = nn.Linear(config.hidden_size, vocabulary, bias=False)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
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


@torch.no_grad()
def generate_naive(model: nn.Module, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return the greedy continuation without a cache: the whole sequence is read again for each new token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class Engine:
    """Samples from a model with a cache. The model has `make_cache` and is called as `model(ids, cache)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        num_samples: int = 1,
        temperature: float = 0.0,
        stop_tokens: tuple[int, ...] = (),
        seed: int = 0,
    ) -> list[list[int]]:
        """Return the new tokens of each sample; a stop token ends its sample and is its last token.

        1. Prefill: the prompt once, whatever the number of samples.
        2. Decode: one new token a row a step. temperature 0 takes the likeliest, else the logits are divided by it.
        3. Sample i has random numbers of its own, from (seed, i): it must not change with the number of samples.
        """
        logits, cache = self._prefill(prompt, len(prompt) + max_new_tokens, num_samples)
        random = [torch.Generator().manual_seed(1_000_003 * seed + i) for i in range(num_samples)]
        samples: list[list[int]] = [[] for _ in range(num_samples)]
        live = [True] * num_samples
        for step in range(max_new_tokens):
            if temperature == 0:
                chosen = logits.argmax(-1).tolist()
            else:
                rows = (logits / temperature).softmax(-1)
                chosen = [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(rows, random, strict=True)]
            for i, token in enumerate(chosen):
                if live[i]:
                    samples[i].append(token)
                    live[i] = token not in stop_tokens
            if not any(live) or step == max_new_tokens - 1:
                break
            logits = self.model(torch.tensor(chosen)[:, None], cache)[:, -1]  # (B, V)
        return samples

    def _prefill(self, prompt: list[int], room: int, num_samples: int) -> tuple[Tensor, KVCache]:
        """Read the prompt once, and copy its keys and values to the rows of all samples."""
        one = self.model.make_cache(1, room)
        logits = self.model(torch.tensor([prompt]), one)[:, -1]  # (1, V)
        cache = self.model.make_cache(num_samples, room)
        cache.tensor[:] = one.tensor
        cache.length = one.length
        return logits.expand(num_samples, -1), cache
