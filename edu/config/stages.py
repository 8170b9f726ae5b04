"""Settings of every stage. No torch here: --help is instant."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edu.config.fields import check_fields, flag
from edu.config.scaling import TUNED_BATCH, TUNED_DEPTH, Sizes, batch_tokens, vocab_size_of

Advantage = Literal["mean", "mean_std", "leave_one_out"]
Normalization = Literal["token", "sequence", "constant"]
Count = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(ge=1, le=10**6)]
"""Of a model, in blocks, channels or heads."""
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of every training stage."""

    out: Path
    """Folder of this stage; holds checkpoints, metrics and, after each save, the model itself."""
    seed: Seed = 0
    """Every random draw is a function of this and the step."""
    max_steps: Count = 100
    """Optimizer steps in all; the schedule ends there."""
    batch_size: Count = 16
    """Rows a step, over all processes."""
    micro_batch_size: Count = 16
    """Rows a forward pass on one process at most, halved while memory runs out; the rest of batch_size is accumulated."""
    matrix_lr: Positive = 0.02
    """Muon's learning rate, for the matrices of the blocks."""
    embedding_lr: Positive = 0.2
    """AdamW's learning rate for the embedding, at 768 channels."""
    head_lr: Positive = 0.004
    """AdamW's learning rate for the head, at 768 channels."""
    lr_scale: Positive = 1.0
    """Factor on the three learning rates."""
    weight_decay: NonNegative = 0.0
    """Decoupled, on the matrices of the blocks."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up."""
    decay: Share = 0.5
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    clip: Positive = 1.0
    """Largest gradient norm of a step."""
    save_every: Count = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Checkpoints kept."""
    eval_every: Count = 100
    """Steps between evaluations; the last step is always evaluated."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto, no (fp32), bf16 or fp16."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after about a minute. Not in RL, whose rows change their shapes."""
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Tracker besides metrics.jsonl: tensorboard, wandb or trackio."""
    push_to_hub: str | None = None
    """Repository user/name to which the finished stage is pushed, as scripts/push.py does."""
    hub_private: bool = False
    """Make that repository private."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"--push-to-hub {self.push_to_hub}: name the repository as user/name")
        if self.hub_private and self.push_to_hub is None:
            raise ValueError("--hub-private: nothing is pushed without --push-to-hub user/name")


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


@dataclass(frozen=True, kw_only=True)
class ChatConfig(StageConfig):
    """Evaluation settings shared by SFT and RL."""

    problems: Path | None = Path("data/tiny/problems")
    """Folder with train.jsonl and test.jsonl in GSM8K's form; none: openai/gsm8k from the Hub."""
    task: str | None = None
    """A task of your own in place of the problems: file.py:name, which is called with "train" or "test" (docs/tasks.md)."""
    identity: Path | None = Path("data/identity_eval.yaml")
    """Held-out questions about itself, asked at the end; none: not asked."""
    persona: Path = Path("data/persona.yaml")
    """File that says who the model is."""
    facts: Path | None = Path("data/tiny/chats_test.jsonl")
    """Held-out fact questions, asked at the end; none: not asked."""
    max_new_tokens: Count = 96
    """A longer answer is cut off and scores 0."""
    eval_samples: Count = 8
    """Samples of each held-out problem, for pass@k."""
    sample_prompts: tuple[str, ...] = ("Who are you?", "Who made you?", "What color is the sky?", "Tell me a story.")
    """Questions answered at every evaluation, for the report."""
    multi_turn: Share = 0.5
    """Share of the conversations that are trained on as further turns of another one, so that any turn may ask anything."""
    eval_limit: Count | None = None
    """Measure on the first so many held-out problems only."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ChatConfig):
    """Learn to answer, from conversations; only what the assistant said is trained."""

    out: Path = Path("runs/tiny/sft")
    model: str = "runs/tiny/base"
    """Folder or Hub id of the model to start from."""
    data: Path = Path("recipes/tiny/mixture.yaml")
    """Mixture file, or one file of conversations (jsonl or parquet)."""
    sequence_length: Count = 256
    """Tokens a row; a longer conversation is left out, and counted."""
    max_steps: Count = 160
    lr_scale: Positive = 0.5
    decay: Share = 1.0
    val_every: Count = 20
    """One conversation in this many is held out for the validation loss."""


@dataclass(frozen=True, kw_only=True)
class RLConfig(ChatConfig):
    """Learn from right and wrong: sample answers to problems, reinforce the better ones of each group."""

    out: Path = Path("runs/tiny/rl")
    model: str = "runs/tiny/sft"
    """Folder or Hub id of the model to start from."""
    num_problems: Count | None = None
    """Train and measure on only the first so many training problems by seed (10: the demonstration)."""
    batch_size: Count = 32
    """Problems a step, over all processes."""
    samples: Count = 8
    """Rollouts of each problem, K."""
    micro_batch_size: Count = 16
    max_steps: Count = 200
    reward: str | None = None
    """A reward function in TRL's signature in place of the task's: file.py:name or package.module:name (docs/tasks.md)."""
    advantage: Advantage = "mean"
    """Reward minus the group's mean; that over its standard deviation; or minus the mean of the others (docs/rl.md)."""
    normalization: Normalization = "token"
    """Every token weighs the same; every answer does; or every token against the longest answer allowed (docs/rl.md)."""
    epochs: Count = 1
    """Updates on the rollouts of a step; from the second on, ratios to the policy that sampled are clipped."""
    clip_low: NonNegative = 0.2
    """A token that became less probable by more than this share is not pushed further down."""
    clip_high: NonNegative = 0.28
    """A token that became more probable by more than this share is not pushed further up."""
    kl: NonNegative = 0.0
    """Factor on the KL to the model that RL started from; 0: no such model is held."""
    dynamic_sampling: bool = False
    """Go on to further problems, in place of those whose answers all earn the same."""
    lr_scale: Positive = 0.4
    warmup: Annotated[int, Field(ge=0)] = 5
    decay: Share = 1.0
    replay: Path | None = Path("recipes/tiny/mixture.yaml")
    """SFT conversations mixed into every step, so that what is not rewarded is not forgotten."""
    replay_weight: NonNegative = 0.3
    """Factor on the replay's own loss."""
    replay_rows: Count = 8
    """Rows of replay a step, over all processes."""
    eval_problems: Count = 64
    """Held-out problems measured during training; the end measures all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"--samples {self.samples}: a group needs two or more, to say which one is better")
        if self.compile:
            raise ValueError(
                "--compile: rows of rollouts have ever new shapes, and each would be compiled; leave it out"
            )
        for name in ("clip_low", "clip_high"):
            if self.epochs == 1 and getattr(self, name) != getattr(RLConfig, name):
                raise ValueError(f"{flag(name)}: nothing is clipped in one update; give --epochs 2 or more with it")


def as_settings(config: Any) -> dict[str, Any]:
    """Return a config as plain values, for YAML and for comparison.

    >>> as_settings(RLConfig())["model"]
    'runs/tiny/sft'
    """
    plain: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return plain
