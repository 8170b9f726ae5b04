"""Reinforce right answers. Example: accelerate launch scripts/rl.py --config recipes/tiny/rl.yaml"""

from edu.config import RLConfig, is_finished, parse, run_script


def main() -> None:
    config = parse(RLConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do")
        return
    from edu.rl import train

    train(config)


if __name__ == "__main__":
    run_script(main)
