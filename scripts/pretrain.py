"""Pretrain a model on the documents of parquet shards.

Example: accelerate launch scripts/pretrain.py --config recipes/tiny/base.yaml
"""

from edu.config.cli import parse, run_script
from edu.config.pretrain import PretrainConfig
from edu.stages.run import run


def main() -> int:
    return run(parse(PretrainConfig))


if __name__ == "__main__":
    run_script(main)
