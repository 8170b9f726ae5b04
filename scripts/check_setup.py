"""Show rank, world size, device, precision and versions. Example: torchrun --nproc_per_node 2 scripts/check_setup.py"""

from dataclasses import dataclass

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    mixed_precision: str = "auto"
    """auto, no (fp32), bf16 or fp16."""


def main() -> None:
    args = parse(Args)
    import torch

    from edu.training.accelerator import compute_init, environment

    accelerator = compute_init(mixed_precision=args.mixed_precision)
    for rank in range(accelerator.num_processes):
        if rank == accelerator.process_index:
            print("  ".join(f"{name}={value}" for name, value in environment(accelerator).items()), flush=True)
        accelerator.wait_for_everyone()
    total = accelerator.gather(torch.ones(1, device=accelerator.device))
    if accelerator.is_main_process:
        print(f"{len(total)} process(es) answered a reduction on {accelerator.device.type}: the setup works")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
