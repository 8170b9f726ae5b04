"""The cache of keys and values: one pre-allocated tensor, for our Engine and for transformers' `generate` alike.

B rows, T new tokens, S cached tokens, K key/value heads, D head dim.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from edu.model.gpt import GPT


class KVCache(Cache):
    """Keys and values of B rows, pre-allocated: logically (B, n_layer, 2, K, S, D), layer first in memory.

    The Engine writes each row at positions of its own (`insert_kv`). `generate(cache=KVCache(rows, length, model))`
    fills all rows to one length, left-padded as its inputs are; `rows` then counts beams and returned sequences too.
    """

    def __init__(self, rows: int, max_seq_len: int, model: GPT) -> None:
        c = model.config
        shape = (c.num_hidden_layers, rows, 2, c.kv_heads, max_seq_len, c.head_dim)
        weight = model.lm_head.weight
        self.memory = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)
        super().__init__(layers=[_Layer(self.memory[i]) for i in range(len(self.memory))])

    @property
    def tensor(self) -> Float[Tensor, "B L 2 K S D"]:
        """The cache in its logical order."""
        return self.memory.transpose(0, 1)

    def insert_kv(
        self, layer: int, kv: Float[Tensor, "B 2 K T D"], positions: Int[Tensor, "B T"] | slice
    ) -> Float[Tensor, "B 2 K S D"]:
        """Write keys and values of the first B rows at their positions, or all at the same; return those rows' cache."""
        cached = self.memory[layer, : len(kv)]
        if isinstance(positions, slice):
            cached[:, :, :, positions] = kv
        else:
            cached[self.rows[: len(kv), None], :, :, positions] = kv.permute(0, 3, 1, 2, 4)  # (B, T, 2, K, D)
        return cached

    def copy_rows(self, targets: list[int], sources: list[int], length: int, source: "KVCache | None" = None) -> None:
        """Copy the first `length` positions of rows of `source` (or this cache) to rows of this cache."""
        if targets:
            self.memory[:, targets, :, :, :length] = (source or self).memory[:, sources, :, :, :length]


class _Layer(CacheLayerMixin):
    """A layer's share of the tensor under transformers' interface: all rows are filled to the same length."""

    is_croppable = True

    def __init__(self, cached: Float[Tensor, "B 2 K S D"]) -> None:
        super().__init__()
        self.keys, self.values = cached[:, 0], cached[:, 1]
        self.batch_size, self.length, self.is_initialized = len(cached), 0, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: the memory is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) keys and values; all that is cached comes back, without gradients."""
        assert self.keys is not None
        assert self.values is not None
        start, self.length = self.length, self.length + key_states.shape[2]
        if len(key_states) != self.batch_size or self.length > self.get_max_length():
            raise ValueError(
                f"this KVCache holds {self.batch_size} rows of {self.get_max_length()} tokens, "
                f"not {len(key_states)} of {self.length}: make a larger one"
            )
        self.keys[:, :, start : self.length] = key_states.detach()
        self.values[:, :, start : self.length] = value_states.detach()
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Cached and new tokens, and the first one's offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens cached."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        assert self.keys is not None
        return self.keys.shape[2]

    def reset(self) -> None:
        """Forget all."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; their number is given below zero, as transformers does."""
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        for cached in (self.keys, self.values):
            assert cached is not None
            cached[:, :, : self.length] = cached[beam_idx, :, : self.length]
