"""Fine-tune on conversations. Example: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml"""

from edu.command import parse, run_script
from edu.config import SFTConfig, is_finished, push_advice


def main() -> int:
    config = parse(SFTConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do{push_advice(config)}")
        return 0
    from edu.sft import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
