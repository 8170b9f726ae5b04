"""Fine-tune on conversations. Example: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml"""

from edu.command import parse, run_script
from edu.config import SFTConfig
from edu.resume import nothing_to_do


def main() -> int:
    config = parse(SFTConfig)
    if nothing_to_do(config):
        return 0
    from edu.sft import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
