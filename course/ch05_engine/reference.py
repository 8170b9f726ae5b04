"""edu's cache, attention and engine under the names of chapter 5."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from course.ch04_block.reference import Config
from edu.inference import engine
from edu.model import gpt, kv_cache

__all__ = ["GPT", "CausalSelfAttention", "Engine", "KVCache", "generate_naive"]

CausalSelfAttention = gpt.CausalSelfAttention


class KVCache(kv_cache.KVCache):
    """edu's cache reads its sizes from a model, and knows a length for each row; here all rows have one length."""

    def __init__(self, batch_size: int, n_layer: int, n_kv_head: int, max_seq_len: int, head_dim: int) -> None:
        sizes = SimpleNamespace(num_hidden_layers=n_layer, kv_heads=n_kv_head, head_dim=head_dim)
        model: Any = SimpleNamespace(config=sizes, dtype=torch.float32, device=torch.device("cpu"))
        super().__init__(batch_size, max_seq_len, model)

    @property
    def length(self) -> int:
        return max(self.lengths)


class GPT(gpt.GPT):
    """The library's model with the chapter's call: ids and a cache in, logits out."""

    def __init__(self, config: Any, vocabulary: int = 64, layers: int = 2) -> None:
        sizes = {"hidden_size": config.hidden_size, "num_key_value_heads": config.num_key_value_heads}
        super().__init__(Config(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=512, **sizes))

    @property
    def embed(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, ids: Tensor, cache: Any = None, **options: Any) -> Any:
        outputs = super().forward(ids, cache=cache, **options)
        return outputs if options else outputs.logits

    def make_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        c = self.config
        return KVCache(batch_size, c.num_hidden_layers, c.kv_heads, max_seq_len, c.head_dim)


def generate_naive(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    return list(engine.generate_naive(model, prompt, max_new_tokens))


class Engine:
    def __init__(self, model: GPT) -> None:
        self._engine = engine.Engine(model)

    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        num_samples: int = 1,
        temperature: float = 0.0,
        stop_tokens: tuple[int, ...] = (),
        seed: int = 0,
    ) -> list[list[int]]:
        (samples,) = self._engine.generate(
            [prompt],
            num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_tokens=stop_tokens,
            seed=seed,
        )
        return [sample.tokens for sample in samples]
