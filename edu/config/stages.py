"""Settings that all stages share, and those of the chat stages. No torch here: --help is instant."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edu.config.fields import check_fields

Count = Annotated[int, Field(ge=1, le=10**9)]
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


def as_settings(config: Any) -> dict[str, Any]:
    """Return a config as plain values, for YAML and for comparison.

    >>> as_settings(StageConfig(out=Path("runs") / "base"))["max_steps"]
    100
    """
    plain: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return plain
