"""Reinforcement learning: sample answers, reward the right ones.

Example: accelerate launch scripts/rl.py --config recipes/tiny/rl.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.stages import RLConfig
from edu.training.resume import nothing_to_do


def main() -> int:
    config = parse(RLConfig)
    if nothing_to_do(config):
        return 0
    from edu.stages.rl import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
