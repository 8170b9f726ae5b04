"""Supervised fine-tuning: train a base model to answer, on conversations.

Example: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.sft import SFTConfig
from edu.stages.run import run


def main() -> int:
    return run(parse(SFTConfig))


if __name__ == "__main__":
    run_script(main)
