"""The loss that the same number of trained tokens reaches under two packings (about a minute a line).

Example: python benchmarks/packing.py --data data/fineweb-edu --tokenizer runs/d12/tokenizer --sequence-lengths 256

The model, its optimizer and their settings are those of recipes/tiny; only the rows differ. Cropping, which throws away the
rest of a document that does not fit, was compared here too and is no longer built in (figures in docs/LOG.md).
"""

import statistics
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edu.config.cli import parse, run_script

PACKINGS: dict[str, dict[str, Any]] = {
    "carried on": {},
    "concatenation": {"buffer_size": 1},
}


@dataclass(frozen=True)
class Args:
    """Data to train on, and how much."""

    data: Path = Path("data/tiny")
    """Folder of parquet shards, validation shards in its val/."""
    tokenizer: Path = Path("runs/tiny/tokenizer")
    """Folder written by scripts/train_tokenizer.py."""
    sequence_lengths: tuple[int, ...] = (128, 256)
    """T of the rows."""
    seeds: int = 2
    """Runs of each packing, from the weights of as many seeds."""
    tokens: int = 300_000
    """Tokens that each run trains on."""
    step_tokens: int = 4096
    """Tokens of a step."""
    eval_tokens: int = 60_000
    """Held-out tokens measured on."""


def main() -> None:
    args = parse(Args)
    from edu.config.pretrain import PretrainConfig
    from edu.data.loader import stream_batches
    from edu.data.shards import list_shards
    from edu.data.tokenizer import Tokenizer
    from edu.evaluation.bits_per_byte import bits_per_byte
    from edu.stages.pretrain import make_model
    from edu.training.accelerator import compute_init
    from edu.training.loop import optimizer_settings
    from edu.training.optimizer import lr_factor, make_optimizer
    from edu.training.step import Term, train_step

    accelerator = compute_init(0, "no")
    tokenizer, shards, held_out = Tokenizer.load(args.tokenizer), *(list_shards(args.data, s) for s in ("train", "val"))

    def run(T: int, seed: int, packing: dict[str, Any]) -> tuple[float, float]:
        """Return bits per byte on held-out rows, and the documents taken."""
        rows, steps = args.step_tokens // T, args.tokens // args.step_tokens
        config = PretrainConfig(seed=seed, sequence_length=T, max_steps=steps)
        model: Any = make_model(config, tokenizer)
        optimizer = make_optimizer(model, **optimizer_settings(config))
        model, optimizer = accelerator.prepare(model, optimizer)
        stream, documents = stream_batches(shards, tokenizer, rows, T, **packing), 0
        for step, (batch, state) in enumerate(islice(stream, steps)):
            optimizer.optimizer.set_lr(lr_factor(step, steps, config.warmup, config.decay))
            train_step(accelerator, model, optimizer, [Term([batch])], config.clip)
            documents = state.documents
        model.eval()
        measured = stream_batches(held_out, tokenizer, rows, T, epochs=1)
        batches = (batch for batch, _ in islice(measured, args.eval_tokens // (rows * T)))
        return bits_per_byte(model, batches, tokenizer.token_bytes()), documents

    print("| T | packing | bits per byte | documents taken |\n|--|--|--|--|")
    for T in args.sequence_lengths:
        for name, packing in PACKINGS.items():
            losses, documents = zip(*(run(T, seed, packing) for seed in range(args.seeds)), strict=True)
            cell = f"{statistics.mean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})"
            print(f"| {T} | {name} | {cell} | {documents[0]:,.0f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
