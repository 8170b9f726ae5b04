"""Reinforcement learning: sample answers, reward the right ones.

Example: accelerate launch scripts/rl.py --config recipes/tiny/rl.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.rl import RLConfig
from edu.stages.run import run


def main() -> int:
    return run(parse(RLConfig))


if __name__ == "__main__":
    run_script(main)
