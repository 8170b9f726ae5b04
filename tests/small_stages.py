"""What the tests of the stages share: data small enough to learn by heart, and the three stages on it.

`torchrun ... tests/small_stages.py HOME OUT` runs them on a filled HOME, one after another, each into a folder of OUT.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from edu.config.pretrain import PretrainConfig
from edu.config.rl import RLConfig
from edu.config.sft import SFTConfig
from edu.config.stages import StageConfig
from edu.data.metrics_log import read_metrics
from edu.data.tokenizer import Tokenizer
from edu.stages import rollouts
from edu.stages.run import train
from edu.tasks.score import Score

SMALL = {"batch_size": 8, "micro_batch_size": 4, "eval_every": 4, "save_every": 3, "warmup": 2}
Stage = tuple[Callable[[Any], Any], StageConfig]
TIMES = ("seconds", "tokens_per_second", "mfu")


def fill(home: Path, tokenizer: Tokenizer) -> None:
    """Write data of every kind into a folder."""
    texts = [
        f"The {a} sees the {b}. The {b} is {c}." for a in ("cat", "dog") for b in ("sun", "hat") for c in ("old", "hot")
    ]
    for folder, count in ((home / "data", 40), (home / "data" / "val", 2)):
        folder.mkdir()
        pq.write_table(pa.table({"text": texts * count}), folder / "shard_00000.parquet", row_group_size=50)
    (home / "problems").mkdir()
    rows = [
        {"question": f"What is {a}+{b}?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        for a in range(5)
        for b in range(4)
    ]
    for split in ("train", "test"):
        (home / "problems" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(home / "tokenizer")


def stages_in(home: Path) -> dict[str, Stage]:
    """The three stages, each on what the one before leaves."""
    base = PretrainConfig(
        out=home / "base",
        data=home / "data",
        tokenizer=home / "tokenizer",
        channels=32,
        layers=2,
        max_steps=8,
        sequence_length=64,
        **SMALL,
    )
    chat = {
        "problems": home / "problems",
        "identity": None,
        "facts": None,
        "eval_samples": 2,
        "eval_limit": 4,
        "sample_prompts": ("Hi",),
        **SMALL,
    }
    tuned = SFTConfig(
        out=home / "sft",
        model=str(home / "base"),
        data=home / "problems" / "train.jsonl",
        max_steps=7,
        sequence_length=64,
        val_every=5,
        **chat,
    )
    reinforced = RLConfig(
        out=home / "rl", model=str(home / "sft"), replay=tuned.data, samples=4, max_new_tokens=24, max_steps=6, **chat
    )
    return {"base": (train, base), "sft": (train, tuned), "rl": (train, reinforced)}


def reward_of(sample: Any) -> float:
    """Reward a sample in a way that an untrained model can earn, so that there is something to reinforce."""
    return float(sample.tokens[0] % 2)


def scoring_by(reward: Callable[[Any], float]) -> Callable[..., list[Score]]:
    """Return a stand-in for `rollouts.score_all` that rewards every sample, finished or not, by a function of it."""
    return lambda samples, *_: [Score(reward(sample)) for sample in samples]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, less what says how fast the machine was."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder / "metrics.jsonl")]


if __name__ == "__main__":
    rollouts.score_all = scoring_by(reward_of)
    Accelerator.end_training = lambda _: None  # ends the process group, which the next stage needs
    for name, (_, config) in stages_in(Path(sys.argv[1])).items():
        train(replace(config, out=Path(sys.argv[2]) / name))
