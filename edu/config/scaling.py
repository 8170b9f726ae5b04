"""Scaling rules of a depth, and the cost of a run: FLOPs, memory. Arithmetic without torch.

The rules are nanochat's: sizes follow the depth, and what was tuned at depth 12 is carried over to others by the
number of training tokens D. Below depth 8 or so they extrapolate: small models like more, smaller steps.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED_DEPTH = 12
TUNED_BATCH = 2**19
"""Tokens a step that were best at depth 12; the learning rates belong to them."""


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


def batch_tokens(tokens: float, tuned_tokens: float) -> int:
    """Return the best number of tokens a step for a run of so many, which grows with D^0.383 (arXiv:2505.13738), in powers of two.

    >>> batch_tokens(1.3e9, 1.3e9), batch_tokens(5.2e9, 1.3e9), batch_tokens(4e7, 1.3e9)
    (524288, 1048576, 131072)
    """
    return 2 ** round(math.log2(TUNED_BATCH * (tokens / tuned_tokens) ** 0.383))


def vocab_size_of(tokenizer: Path) -> int:
    """Count the ids of a tokenizer's folder; ValueError where there is none."""
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"--tokenizer {tokenizer}: no tokenizer there, and the horizon of --depth counts its vocabulary"
        )
    described = json.loads(path.read_text(encoding="utf-8"))
    return 1 + max([*described["model"]["vocab"].values(), *(token["id"] for token in described["added_tokens"])])
