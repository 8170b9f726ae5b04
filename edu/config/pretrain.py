"""Settings of pretraining, and those that --depth implies.

The rules are nanochat's: sizes follow the depth, and what was tuned at depth 12 is carried over to others by the
number of training tokens D. Below depth 8 or so they extrapolate: small models like more, smaller steps.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edu.config.scaling import Sizes
from edu.config.stages import Count, Positive, StageConfig

TUNED_DEPTH = 12
TUNED_BATCH = 2**19
"""Tokens a step that were best at depth 12; the learning rates belong to them."""
Size = Annotated[int, Field(ge=1, le=10**6)]
"""Of a model, in blocks, channels or heads."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Learn language from the documents of parquet shards."""

    out: Path = Path("runs/tiny/base")
    data: Path = Path("data/tiny")
    """Folder of training shards; its folder val/ holds the validation shards."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A shard or row group that cannot be read ends the run, or is named, counted and left out."""
    tokenizer: Path = Path("runs/tiny/tokenizer")
    """Folder written by scripts/train_tokenizer.py."""
    depth: Size | None = None
    """The one dial: sets layers, channels, heads, batch_size, lr_scale and max_steps, where they are not given."""
    ratio: Positive = 12.0
    """With a depth: tokens to train on for each parameter of blocks and head (nanochat's 12)."""
    layers: Size = 4
    """Blocks."""
    channels: Size = 128
    """Width of the residual stream."""
    heads: Size = 4
    """Query heads."""
    kv_heads: Size = 2
    """Key/value heads; each serves heads / kv_heads query heads."""
    sequence_length: Count = 256
    """Tokens a row; also the model's context."""
    max_steps: Count = 600
    warmup: Annotated[int, Field(ge=0)] = 20
    sample_prompts: tuple[str, ...] = ("The sky is", "Tom has 6 apples.", "Anna: What is your name?")
    """Texts continued at every evaluation."""
    eval_batches: Count = 8
    """Validation batches of batch_size rows an evaluation; twenty times as many at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and self.layers != self.depth:
            raise ValueError(f"--depth {self.depth} means as many layers: leave --layers {self.layers} out")
        if self.depth is None and self.ratio != PretrainConfig.ratio:
            raise ValueError(f"--ratio {self.ratio}: goes with --depth")

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Derive settings that are not given from `--depth`; nothing without one.

        1. The sizes.
        2. The horizon: ratio x (parameters of blocks and head) tokens.
        3. The batch that suits the horizon, and with it the learning rates, as its square root.
        """
        told = {"ratio": cls.ratio, "sequence_length": cls.sequence_length, "tokenizer": cls.tokenizer, **given}
        depth, T = given.get("depth"), told["sequence_length"]
        if (
            depth is None
            or min(depth, T, told["ratio"], told.get("batch_size", 1)) <= 0
            or told.get("layers", depth) != depth
        ):
            return {}  # nothing to say, or what __post_init__ refuses
        sizes = dataclasses.asdict(Sizes.of_depth(depth))
        found = {name: given.get(name, sizes[name]) for name in ("channels", "heads", "kv_heads")}
        found["layers"] = depth
        if "batch_size" not in given or "max_steps" not in given:
            vocab_size = vocab_size_of(told["tokenizer"])
            tokens = told["ratio"] * Sizes(**found, vocab_size=vocab_size).computed
            tuned = told["ratio"] * Sizes.of_depth(TUNED_DEPTH, vocab_size).computed
            told = {"batch_size": max(1, batch_tokens(tokens, tuned) // T), **told}
            told = {"max_steps": max(1, round(tokens / (told["batch_size"] * T))), **told}
        scale = (told["batch_size"] * T / TUNED_BATCH) ** 0.5
        return found | {"lr_scale": scale, "batch_size": told["batch_size"], "max_steps": told["max_steps"], **given}


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
