"""One SFT batch, token by token: what the model reads beside what it must say. Example: python scripts/show_sft_batch.py"""

from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    data: Path = Path("recipes/tiny/mixture.yaml")
    """Mixture file, or one file of conversations."""
    tokenizer: Path = Path("runs/tiny/tokenizer")
    """Folder of the tokenizer."""
    sequence_length: int = 256
    """Tokens a row."""
    batch_size: int = 2
    """Rows of the batch."""
    seed: int = 0
    """Order of the conversations."""
    multi_turn: float = 0.5
    """Share of the conversations that become further turns of another one, as in scripts/sft.py."""


def main() -> None:
    args = parse(Args)
    from rich.console import Console
    from rich.text import Text

    from edu.chat.mixture import load_sft_data
    from edu.chat.sft_data import Epochs, batches_of
    from edu.data.packing import IGNORE
    from edu.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    data = load_sft_data(args.data, tokenizer, args.sequence_length)
    rows = Epochs(data.train, args.sequence_length, args.seed, args.multi_turn).rows(0, args.batch_size)
    (batch,) = batches_of([rows], args.sequence_length, tokenizer.pad)
    console = Console(highlight=False)
    for b in range(args.batch_size):
        console.print(f"row {b}: position, input, target (green: trained; dim: only read)")
        for i in range(args.sequence_length):
            position, target = int(batch.positions[b, i]), int(batch.targets[b, i])
            trained = target != IGNORE
            said = repr(tokenizer.decode([target])) if trained else "-1"
            line = f"{position:5d}  {tokenizer.decode([int(batch.inputs[b, i])])!r:24} {said}"
            console.print(Text(line, style="green" if trained else "dim"))
    share = float((batch.targets != IGNORE).float().mean())
    print(
        f"inputs {tuple(batch.inputs.shape)}, targets {tuple(batch.targets.shape)}: {share:.0%} of the places are trained"
    )


if __name__ == "__main__":
    run_script(main)
