"""Bring a checkpoint of nanochat over. Example: python scripts/import_nanochat.py --checkpoint ~/.cache/nanochat/chatsft_checkpoints/d20"""

from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    checkpoint: Path = Path()
    """nanochat's folder of one model, with its model_*.pt and meta_*.json. It has to be given."""
    out: Path = Path("runs/nanochat")
    """New folder to write: a checkpoint for every script here, and for transformers."""
    step: int | None = None
    """Which checkpoint; the last one by default."""
    tokenizer: Path | None = None
    """tokenizer.pkl or its folder; by default beside the weights, or where nanochat keeps it. Read, never unpickled."""


def main() -> None:
    args = parse(Args)
    from edu.hub.nanochat import import_nanochat
    from edu.model.load import quiet_transformers

    quiet_transformers()
    out = import_nanochat(args.checkpoint, args.out, args.step, args.tokenizer)
    print(f"{out}: written; talk to it: python scripts/chat.py --model {out}")


if __name__ == "__main__":
    run_script(main)
