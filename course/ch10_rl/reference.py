"""edu's advantages and loss under the names of chapter 10; the loop around them is the plain one."""

from typing import Any

import torch
from torch import Tensor

from course.ch10_rl import solution
from edu.stages import objective

sample, token_logprobs = solution.sample, solution.token_logprobs


def advantages(rewards: Tensor) -> Tensor:
    return torch.tensor([objective.advantages(group) for group in rewards.tolist()])


def policy_loss(logprobs: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """sum(w * -log p) / N with the weights and the N of the stage, where every token weighs the same."""
    lengths = [int(length) for length in mask.sum(-1).tolist()]
    N = objective.normalizer(lengths, "token", max(lengths))
    return (mask * advantage[:, None] * -logprobs).sum() / max(N, 1)


def rl_step(*args: Any) -> float:
    """The plain loop, with the functions above in place of its own."""
    plain = solution.advantages, solution.policy_loss
    solution.advantages, solution.policy_loss = advantages, policy_loss
    try:
        return solution.rl_step(*args)
    finally:
        solution.advantages, solution.policy_loss = plain
