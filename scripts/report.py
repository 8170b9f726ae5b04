"""Write a run's report (report.html, report.md) from what its stages left. Example: python scripts/report.py --run runs/tiny"""

from dataclasses import dataclass
from pathlib import Path

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    run: Path = Path("runs/tiny")
    """The run's folder: base/, sft/, rl/ in it."""


def main() -> None:
    args = parse(Args)
    from edu.evaluation.report import write_report

    print(f"report: {write_report(args.run)}")


if __name__ == "__main__":
    run_script(main)
