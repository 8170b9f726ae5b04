"""What each detail of RL is for: the same short run with one of them undone, again and again (10 minutes on one core).

Example: python benchmarks/ablations.py --model runs/tiny/sft

None of these is a setting of scripts/rl.py, since each is a mistake; here one function is replaced for the run. Without
replay, which trains the stop token too and would hide its lack.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    """What to run."""

    model: str = "runs/tiny/sft"
    """Where each run starts."""
    problems: Path = Path("data/tiny/problems")
    out: Path = Path("runs/ablations")
    """Folder of the runs; one that is finished there is only shown."""
    steps: int = 60
    block: int = 10
    """Steps whose mean is shown, and between two measurements on held-out problems."""
    top_k: int = 5
    seed: int = 0
    only: tuple[str, ...] = ()
    """Names of the runs wanted; all without it."""


def main() -> None:
    args = parse(Args)
    import torch

    from edu.config import metrics
    from edu.config.rl import RLConfig
    from edu.data.metrics_log import read_metrics
    from edu.data.packing import TrainingExample
    from edu.inference.engine import Engine
    from edu.stages import rl, run
    from edu.stages.rollouts import Rollout

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)

    def without_stop(self: Rollout) -> TrainingExample:
        """The piece of a rollout in which the token that ended it is only read."""
        whole = piece(self)
        ended = self.sample.finish_reason == "stop"
        return replace(whole, mask=[*whole.mask[:-1], 0]) if ended else whole

    class TopK(Engine):
        """Samples from the likeliest tokens only, while the log-probabilities trained are of all."""

        def generate(self, prompts: Any, num_samples: int = 1, params: Any = None, **options: Any) -> Any:
            return super().generate(prompts, num_samples, replace(params, top_k=args.top_k), **options)

    def from_top_k(engine: Engine, *rest: Any, **options: Any) -> Any:
        return roll_out(TopK(engine.model), *rest, **options)

    def by_group(self: rl.Reinforcement, step: int, rollouts: list[Rollout]) -> Iterator[Any]:
        """The mean over groups of the mean over a group's tokens: a micro-batch a problem, each divided by its own count."""
        K = self.config.samples
        groups = [rollouts[at : at + K] for at in range(0, len(rollouts), K)]
        total = sum(r.length for r in rollouts)
        scales = [total / (len(groups) * sum(r.length for r in group)) for group in groups]
        scaled = [replace(r, advantage=r.advantage * s) for group, s in zip(groups, scales, strict=True) for r in group]
        return terms(self, step, scaled)

    roll_out, terms = rl.roll_out, rl.Reinforcement.terms
    whole: Any = Rollout.piece
    piece: Callable[[Rollout], TrainingExample] = whole.fget
    undone: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "as it is": nullcontext,
        "stop token not trained": lambda: patch.object(Rollout, "piece", property(without_stop)),
        f"sampled from the top {args.top_k}": lambda: patch.object(rl, "roll_out", from_top_k),
        "mean of means": lambda: patch.object(rl.Reinforcement, "terms", by_group),
    }
    shown = {
        "reward": metrics.REWARD,
        "tokens an answer": metrics.MEAN_LENGTH,
        "cut off": metrics.CLIPPED_RATIO,
        "entropy": metrics.ENTROPY,
    }
    ends = range(args.block, args.steps + 1, args.block)
    print(f"| run | | {' | '.join(f'{end - args.block + 1}-{end}' for end in ends)} |\n|{'--|' * (len(ends) + 2)}")
    for name, undo in undone.items():
        if args.only and name not in args.only:
            continue
        config = RLConfig(
            out=args.out / name.replace(" ", "_"), model=args.model, problems=args.problems, seed=args.seed,
            max_steps=args.steps, eval_every=args.block, eval_samples=4, eval_limit=8, save_every=args.steps, replay=None,
            identity=None, facts=None, sample_prompts=(),
        )  # fmt: skip
        if not (config.out / "eval.json").is_file():
            with undo():
                run.train(config)
        rows = read_metrics(config.out / "metrics.jsonl")
        for label, metric in shown.items():
            steps = {row["step"]: row[metric] for row in rows if metric in row}
            means = [fmean(steps[i] for i in range(end - args.block + 1, end + 1)) for end in ends]
            print(f"| {name} | {label} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
        held_out = {row["step"]: row[metrics.PASS_AT_1] for row in rows if metrics.PASS_AT_1 in row}
        values = " | ".join(f"{held_out[end]:.2f}" for end in ends)
        print(f"| {name} | held-out, at the end (before: {held_out[0]:.2f}) | {values} |", flush=True)


if __name__ == "__main__":
    run_script(main)
