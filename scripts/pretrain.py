"""Pretrain a model on the documents of parquet shards.

Example: accelerate launch scripts/pretrain.py --config recipes/tiny/base.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.stages import PretrainConfig
from edu.training.resume import nothing_to_do


def main() -> int:
    config = parse(PretrainConfig)
    if nothing_to_do(config):
        return 0
    from edu.stages.pretrain import train

    return 0 if train(config).finished else 130


if __name__ == "__main__":
    run_script(main)
