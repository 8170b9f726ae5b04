"""Cache of keys and values: one pre-allocated tensor, for our Engine and for transformers' `generate` alike.

A token's keys and values never change once later tokens are appended, since no token looks ahead. So they are computed
once and kept, and each step of generation computes one token instead of the sequence. The cache owns the positions: it
knows how many tokens each row holds, and writes new ones after them.

B rows, T new tokens, S cached tokens, K key/value heads, D head dim.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


class KVCache(Cache):
    """Keys and values of B rows, pre-allocated: logically (B, n_layer, 2, K, S, D), layer first in memory.

    Attention calls `insert_kv` (under transformers' name `update`). Rows may have lengths of their own, as the Engine's do;
    `generate(cache=KVCache(rows, length, model))` fills all rows to one length, left-padded as its inputs are, and `rows`
    then counts beams and returned sequences too.
    """

    def __init__(self, rows: int, max_seq_len: int, model: PreTrainedModel) -> None:
        c: Any = model.config
        shape = (c.num_hidden_layers, rows, 2, c.kv_heads, max_seq_len, c.head_dim)
        self.memory = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.lengths = [0] * rows
        """Number of tokens in each row"""
        super().__init__(layers=[])

    @property
    def tensor(self) -> Float[Tensor, "B L 2 K S D"]:
        """Return the cache in its logical order."""
        return self.memory.transpose(0, 1)

    def insert_kv(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]
    ) -> tuple[Float[Tensor, "B K S D"], Float[Tensor, "B K S D"]]:
        """Append keys and values to the first B rows, and return all keys and values of these rows, padded to the longest.

        Memory beyond a row's length is not cleared: a mask hides it. There are no gradients.
        """
        B, _, T, _ = k.shape
        # The first layer of a forward pass counts the new tokens and picks their places; later layers write to the same
        # ones.
        if layer == 0:
            self._make_room(B, T)
        keys, values = self.memory[layer, :B].unbind(1)  # (B, K, S, D) each
        for cached, new in ((keys, k), (values, v)):
            if isinstance(self._at, slice):
                cached[:, :, self._at] = new.detach()
            else:  # indexing by rows and positions puts these two first: (B, T, K, D)
                cached[self._at[0], :, self._at[1]] = new.detach().transpose(1, 2).to(cached.dtype)
        end = max(self.lengths[:B])
        return keys[:, :, :end], values[:, :, :end]

    def _make_room(self, B: int, T: int) -> None:
        """Count T more tokens in the first B rows, and note where they go: one slice, or rows and positions (B, T)."""
        lengths = [length + T for length in self.lengths[:B]]
        if len(lengths) < B or max(lengths) > self.get_max_length():
            raise ValueError(
                f"this KVCache holds {len(self.lengths)} rows of {self.get_max_length()} tokens, "
                f"not {B} of {max(lengths)}: make a larger one"
            )
        self.lengths[:B] = lengths
        end, device = lengths[0], self.memory.device
        self._at: slice | tuple[Tensor, Tensor] = slice(end - T, end)
        if min(lengths) < max(lengths):
            starts = torch.tensor(lengths, device=device)[:, None] - T
            self._at = torch.arange(B, device=device)[:, None], starts + torch.arange(T, device=device)

    def view_rows(self, first: int, last: int) -> "KVCache":
        """Return rows `first` to `last` - 1 as a cache that shares this memory and starts empty."""
        part = copy.copy(self)
        part.memory, part.lengths = self.memory[:, first:last], [0] * (last - first)
        return part

    def copy_rows(self, targets: list[int], sources: list[int]) -> None:
        """Copy rows of this cache to other rows of it."""
        if targets:
            end = max(self.lengths[source] for source in sources)
            self.memory[:, targets, :, :, :end] = self.memory[:, sources, :, :, :end]
            for target, source in zip(targets, sources, strict=True):
                self.lengths[target] = self.lengths[source]

    # The rest is transformers' interface for caches.

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        return self.insert_kv(layer_idx, key_states, value_states)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens in the longest row."""
        del layer_idx
        return max(self.lengths)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens that a row has room for."""
        del layer_idx
        return self.memory.shape[4]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of cached and new tokens, and the offset of the first."""
        del layer_idx
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths = [0] * len(self.lengths)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; their number is given as a negative number, as in transformers."""
        self.lengths = [length + tokens_to_remove for length in self.lengths]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i], for beam search."""
        self.copy_rows(list(range(len(beam_idx))), beam_idx.tolist())
