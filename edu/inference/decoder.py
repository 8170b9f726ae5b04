"""Decoders: they run a language model on prompts to fill a cache, then on rows of any lengths, one token a step.

B rows, T prompt positions, S cached tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from edu.model import gpt
from edu.model.fast_path import load
from edu.model.gpt import GPT
from edu.model.kv_cache import KVCache
from edu.model.linear import Linear, at_least_fp32

PREFILL_CHUNK = 1024
"""Positions per prefill pass, which bounds the memory that long prompts take."""


class Decoder(Protocol):
    """Interface between the scheduler and a model: the model itself, or a faster way to compute the same."""

    def prefill(self, prompts: Sequence[list[int]], cache: KVCache) -> None:
        """Fill the first rows of an empty cache with prompts of any lengths."""
        ...

    def step(self, tokens: Int[Tensor, "B"], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append a token to each of the cache's first B rows, and return the logits of the next one, in fp32 or wider."""
        ...


class ModelDecoder:
    """Decoder that calls the model: its attention writes to the cache and reads from it, with its current weights."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def _forward(self, tokens: Tensor, cache: KVCache, **options: Any) -> Tensor:
        # forward, not a call: if the model was compiled for training, a call would compile it anew for each length.
        outputs: Any = self.model.forward(tokens, cache=cache, logits_to_keep=1, **options)
        return outputs.logits[:, -1]

    def prefill(self, prompts: Sequence[list[int]], cache: KVCache) -> None:
        """Compute all prompts together, PREFILL_CHUNK positions at a time.

        Shorter ones are padded on the right. No token looks ahead, so no token of a prompt sees the padding, and the
        row's next tokens overwrite it.
        """
        for start, ids in padded_chunks(prompts, cache):
            assert cache.get_seq_length() == start, "prompts go into an empty cache"
            self._forward(ids, cache)
        cache.lengths[: len(prompts)] = map(len, prompts)

    def step(self, tokens: Int[Tensor, "B"], cache: KVCache) -> Float[Tensor, "B V"]:
        """Compute one token per row, at the row's own position; a mask hides all positions beyond it."""
        lengths = cache.lengths[: len(tokens)]
        ragged = dict[str, Tensor]()
        if min(lengths) < max(lengths):
            positions = torch.tensor(lengths, device=tokens.device)[:, None]  # (B, 1)
            seen = torch.arange(max(lengths) + 1, device=tokens.device) <= positions  # (B, S)
            ragged = {"position_ids": positions, "attention_mask": seen[:, None, None]}  # (B, 1, 1, S) for all heads
        return at_least_fp32(self._forward(tokens[:, None], cache, **ragged))


def padded_chunks(prompts: Sequence[list[int]], cache: KVCache) -> list[tuple[int, Int[Tensor, "B T"]]]:
    """Return the prompts, padded on the right to the longest, in chunks of PREFILL_CHUNK positions, with each chunk's start."""
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=cache.memory.device)
    return [(start, ids[:, start : start + PREFILL_CHUNK]) for start in range(0, width, PREFILL_CHUNK)]


OWN = {gpt.GPT, gpt.GPTModel, gpt.Block, gpt.CausalSelfAttention, gpt.MLP, gpt.Head, gpt.OutputLinear}
OWN |= {Linear, nn.Embedding, nn.ModuleList}


def is_untouched(model: nn.Module) -> bool:
    """Return True if every module is exactly one of the project's own, without hooks and with its class's forward."""
    return all(
        type(module) in OWN and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for module in model.modules()
    )


def decoder_for(model: GPT, kept: Any = None) -> Decoder:
    """Return the fastest decoder: edu/fast's for an untouched model in fp32 on a CPU, else the model itself.

    `kept`, an earlier decoder, is used again if it belongs to this model and its copies of the weights are current.
    """
    if model.device.type == "cpu" and model.dtype == torch.float32 and is_untouched(model):
        fast = load("cpu_decoder")
        if fast is not None:
            usable = isinstance(kept, fast.CPUDecoder) and kept.model is model and kept.is_current
            return kept if usable else fast.CPUDecoder(model)
    return ModelDecoder(model)
