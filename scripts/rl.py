"""Reinforce right answers. Example: accelerate launch scripts/rl.py --config recipes/tiny/rl.yaml"""

from edu.command import parse, run_script
from edu.config import RLConfig, is_finished, push_advice


def main() -> int:
    config = parse(RLConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do{push_advice(config)}")
        return 0
    from edu.rl import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
