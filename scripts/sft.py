"""Supervised fine-tuning: train a base model to answer, on conversations.

Example: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.stages import SFTConfig
from edu.training.resume import nothing_to_do


def main() -> int:
    config = parse(SFTConfig)
    if nothing_to_do(config):
        return 0
    from edu.stages.sft import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
