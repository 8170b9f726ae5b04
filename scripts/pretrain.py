"""Pretrain on parquet shards. Example: accelerate launch scripts/pretrain.py --config recipes/tiny/base.yaml"""

from edu.config import PretrainConfig, is_finished, parse, run_script


def main() -> None:
    config = parse(PretrainConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do")
        return
    from edu.pretrain import train

    train(config)


if __name__ == "__main__":
    run_script(main)
