"""Pretrain on parquet shards. Example: accelerate launch scripts/pretrain.py --config recipes/tiny/base.yaml"""

from edu.command import parse, run_script
from edu.config import PretrainConfig, is_finished, push_advice


def main() -> int:
    config = parse(PretrainConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do{push_advice(config)}")
        return 0
    from edu.pretrain import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
