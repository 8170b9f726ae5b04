"""Sizes of a model and what a run of it will cost: parameters, FLOPs, memory. Arithmetic without torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Sizes from which a model's parameters, FLOPs and memory follow.

    >>> d12 = Sizes.of_depth(12, vocab_size=32768)
    >>> d12.channels, d12.heads, f"{d12.blocks:,}", f"{d12.parameters:,}"
    (768, 6, '84,934,656', '135,266,304')
    """

    layers: int
    channels: int
    heads: int
    kv_heads: int
    vocab_size: int

    @classmethod
    def of_depth(cls, depth: int, vocab_size: int = 0) -> "Sizes":
        """Return nanochat's sizes of a depth: 64 channels a layer, rounded up to whole heads of 128; as many key/value heads as query heads."""
        heads = -(-depth * 64 // 128)
        return cls(depth, heads * 128, heads, heads, vocab_size)

    @classmethod
    def of_config(cls, config: Any) -> "Sizes":
        """Read them from a model's configuration (edu.model.config.GPTConfig)."""
        layers, C, H = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        return cls(layers, C, H, config.kv_heads, config.vocab_size)

    @property
    def blocks(self) -> int:
        """Count the parameters of the blocks' matrices: q and o, k and v, and an MLP four times as wide."""
        C = self.channels
        return self.layers * (2 * C * C + 2 * C * C * self.kv_heads // self.heads + 8 * C * C)

    @property
    def parameters(self) -> int:
        """Count all parameters: blocks, embedding, head."""
        return self.blocks + 2 * self.vocab_size * self.channels

    @property
    def computed(self) -> int:
        """Count the parameters that are multiplied with every token: blocks and head."""
        return self.blocks + self.vocab_size * self.channels

    def flops_per_token(self, sequence_length: float) -> float:
        """Return FLOPs of forward and backward: 6 a multiplied parameter, and attention in full (PaLM, arXiv:2204.02311, app. B)."""
        return 6 * self.computed + 12 * self.layers * self.channels * sequence_length

    def memory(self, micro_batch_size: int, sequence_length: int, bytes_each: int = 4) -> int:
        """Estimate the bytes of a training step on one process: weights, gradients, optimizer, activations.

        Weights, gradients and Muon's momentum are 4 bytes each, AdamW's two moments (embedding, head) 8. A block keeps
        about 40 values of each channel for the backward pass (measured); the head holds a few chunks of 1024 logits in fp32.
        """
        state = 8 * self.parameters + 4 * self.blocks + 8 * (self.parameters - self.blocks)
        kept = micro_batch_size * sequence_length * self.channels * 40 * self.layers * bytes_each
        return state + kept + 4 * 1024 * self.vocab_size * 4
