"""Settings of supervised fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from edu.config.stages import ChatConfig, Count, Positive, Share


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
