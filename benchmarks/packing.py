"""The loss that the same number of trained tokens reaches under the three packings (about a minute a line).

Example: python benchmarks/packing.py --data data/fineweb-edu --tokenizer runs/d12/tokenizer --sequence-lengths 256

Two cases matter: text in plenty (--tokens well below what DATA holds: throwing away costs nothing), and text that is
used up (--tokens as many as DATA holds or more: what was thrown away is made up for by repeating the rest).

The model, its optimizer and their settings are those of recipes/tiny; only the rows differ. The loss is measured on held-out
text in two ways, since each packing is at home in one: the rows that the loader gives, some of which start within a
document, and rows in which every piece starts with its document, as cropping trains them.
"""

import statistics
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edu.config.cli import parse, run_script

PACKINGS: dict[str, dict[str, Any]] = {
    "carried on": {},
    "cropped": {"carry": False},
    "concatenation": {"buffer_size": 1},
}


@dataclass(frozen=True)
class Args:
    """What to train on, and how much."""

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
    """Of these, a step."""
    eval_tokens: int = 60_000
    """Held-out tokens measured on, of either kind of rows."""


def main() -> None:
    args = parse(Args)
    from edu.config.stages import PretrainConfig
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

    def run(T: int, seed: int, packing: dict[str, Any]) -> tuple[float, float, float]:
        """Bits per byte on the loader's rows and on documents' beginnings; passes over the data."""
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
        found = []
        for carry in (True, False):
            measured = stream_batches(held_out, tokenizer, rows, T, epochs=1, carry=carry)
            batches = (batch for batch, _ in islice(measured, args.eval_tokens // (rows * T)))
            found.append(bits_per_byte(model, batches, tokenizer.token_bytes()))
        return found[0], found[1], documents

    print("| T | packing | the loader's rows | documents' beginnings | documents taken |\n|--|--|--|--|--|")
    for T in args.sequence_lengths:
        for name, packing in PACKINGS.items():
            rows, starts, documents = zip(*(run(T, seed, packing) for seed in range(args.seeds)), strict=True)
            cells = (
                f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"
                for values in (rows, starts)
            )
            print(f"| {T} | {name} | {' | '.join(cells)} | {documents[0]:,.0f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
