"""Train a small policy by variants of the step, and plot the mean reward. python -m course.ch10_rl.ablation (a minute)

The task: after token t write the token t + 1, then stop. A right answer is rare at first: one in 64.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from course.ch10_rl import solution

STOP, VOCABULARY, STEPS, SEEDS = 0, 8, 200, 3


class Policy(nn.Module):
    """The next token depends on the two before it: a table of logits, (V, V, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY, VOCABULARY))

    def forward(self, ids: Tensor) -> Tensor:
        before = torch.cat((ids[:, :1], ids[:, :-1]), dim=1)
        return self.logits[before, ids]


@contextmanager
def replaced(name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Let the solution use another function for a while."""
    original = getattr(solution, name)
    setattr(solution, name, value)
    try:
        yield
    finally:
        setattr(solution, name, original)


def top_k(policy: nn.Module, *args: Any) -> list[list[int]]:
    """Rollouts from the three likeliest tokens alone."""

    def cut(ids: Tensor) -> Tensor:
        logits = policy(ids)
        return logits.masked_fill(logits < logits.topk(3).values[..., -1:], -1e9)

    return ROLLOUT(cut, *args)


def without_stop(logprobs: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """The loss with each row's last sampled token left out."""
    last = mask.cumsum(-1) == mask.sum(-1, keepdim=True)
    return LOSS(logprobs, mask * ~last, advantage)


ROLLOUT, LOSS = solution.sample, solution.policy_loss
VARIANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the step": ("policy_loss", LOSS),
    "no baseline": ("advantages", lambda rewards: rewards),
    "rollouts by top-k": ("sample", top_k),
    "stop token not trained": ("policy_loss", without_stop),
}


def train(seed: int) -> list[float]:
    torch.manual_seed(seed)
    policy, generator = Policy(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    prompts = [[token] for token in range(1, VOCABULARY)]

    def wanted(prompt: list[int], new: list[int]) -> float:
        return float(new == [prompt[0] % (VOCABULARY - 1) + 1, STOP])

    return [solution.rl_step(policy, optimizer, prompts, wanted, 16, 4, STOP, generator) for _ in range(STEPS)]


def main(picture: Path) -> None:
    for name, (function, value) in VARIANTS.items():
        with replaced(function, value):
            runs = torch.tensor([train(seed) for seed in range(SEEDS)])
        half = next((step for step, mean in enumerate(runs.mean(0).tolist()) if mean >= 0.5), STEPS)
        print(f"{name:24} half of the answers right after {half} steps, {float(runs[:, -10:].mean()):.0%} at the end")
        plt.plot(runs.mean(0).tolist(), label=name)
    plt.xlabel(f"step (mean of {SEEDS} seeds)")
    plt.ylabel("mean reward")
    plt.legend()
    picture.parent.mkdir(exist_ok=True)
    plt.savefig(picture, dpi=90)
    print(f"the curves: {picture}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my/ablation_rl.png"))
