"""Settings of reinforcement learning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edu.config.fields import flag
from edu.config.stages import ChatConfig, Count, NonNegative, Positive, Share

Advantage = Literal["mean", "mean_std", "leave_one_out"]
Normalization = Literal["token", "sequence", "constant"]


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
