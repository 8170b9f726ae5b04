"""Fine-tune on conversations. Example: accelerate launch scripts/sft.py --config recipes/tiny/sft.yaml"""

from edu.config import SFTConfig, is_finished, parse, run_script


def main() -> None:
    config = parse(SFTConfig)
    if is_finished(config):
        print(f"{config.out}: finished, nothing to do")
        return
    from edu.sft import train

    train(config)


if __name__ == "__main__":
    run_script(main)
