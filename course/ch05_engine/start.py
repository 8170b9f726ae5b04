"""Chapter 5: the KV cache and the engine. Fill in the bodies; `make grade CHALLENGE=5` says what holds.

B rows, T new positions, S positions in all, H query heads, K key/value heads, D channels of a head, V vocabulary.
Block, MLP and the rotation are those of chapter 4 (the plain solution here; your own `from block import ...` will do).
"""

from torch import Tensor, nn

from course.ch04_block.solution import MLP, Config, apply_rotary_emb, rms_norm, rotary_angles


class KVCache:
    """Keys and values of every position read so far, in one tensor that is allocated once."""

    def __init__(self, batch_size: int, n_layer: int, n_kv_head: int, max_seq_len: int, head_dim: int) -> None:
        """Make `self.tensor`, (B, n_layer, 2, n_kv_head, max_seq_len, head_dim), and `self.length` = 0."""
        raise NotImplementedError

    def insert_kv(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer, (B, K, T, D) each; return all of that layer so far, (B, K, S, D).

        All layers of one forward pass write at the same positions: `length` moves when the last layer has written.
        """
        raise NotImplementedError


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
        raise NotImplementedError


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


def generate_naive(model: nn.Module, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return the greedy continuation without a cache: the whole sequence is read again for each new token."""
    raise NotImplementedError


class Engine:
    """Samples from a model with a cache. The model has `make_cache` and is called as `model(ids, cache)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

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
        2. Decode: one new token a row a step, and no pass after the last one. temperature 0 takes the likeliest, else the logits are divided by it.
        3. Sample i has random numbers of its own, from (seed, i): it must not change with the number of samples.
        """
        raise NotImplementedError
