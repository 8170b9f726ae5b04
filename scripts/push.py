"""Upload a checkpoint to the Hub, card included. Example: python scripts/push.py --model runs/tiny/rl --repo user/name --private"""

from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    model: Path = Path("runs/tiny/rl")
    """The checkpoint's folder."""
    repo: str = ""
    """Repository user/name. It has to be given."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to push to, made if need be; main by default."""


def main() -> None:
    args = parse(Args)
    from edu.hub.push import push

    print(f"pushed: {push(args.model, args.repo, private=args.private, revision=args.revision)}")


if __name__ == "__main__":
    run_script(main)
