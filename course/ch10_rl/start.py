"""Chapter 10: reinforcement learning from right and wrong. Fill in the bodies; `make grade CHALLENGE=10` says what holds.

P problems, K samples of each (a group), B = rows, T positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def advantages(rewards: Tensor) -> Tensor:
    """Return how much better each sample is than its group: reward - mean of the group; (P, K) -> (P, K)."""
    raise NotImplementedError


def policy_loss(logprobs: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    """Return the loss whose gradient makes better samples likelier: a scalar.

    logprobs: (B, T), log-probability of each token. mask: (B, T), 1 where the policy sampled the token, 0 on the prompt,
    on what a tool wrote and on padding. advantage: (B,), constants.

    The mean of -logprob * advantage over all sampled tokens of all rows.
    """
    raise NotImplementedError


def sample(
    policy: nn.Module, prompt: list[int], num_samples: int, max_new_tokens: int, stop: int, generator: torch.Generator
) -> list[list[int]]:
    """Return new tokens drawn from softmax(policy(ids)) as it is: no temperature, no top-k. `stop` is kept, and ends.

    policy(ids): (B, T) -> logits (B, T, V). Read everything again for each token: no cache is needed here.
    """
    raise NotImplementedError


def token_logprobs(policy: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probability of each token given those before it; (B, T) -> (B, T), 0.0 for the first of a row."""
    raise NotImplementedError


def rl_step(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    reward: Callable[[list[int], list[int]], float],
    num_samples: int,
    max_new_tokens: int,
    stop: int,
    generator: torch.Generator,
) -> float:
    """Make one update, and return the mean reward of its samples. reward(prompt, new tokens) -> 1.0 or 0.0.

    1. Rollout: num_samples samples of each prompt.
    2. Score them, and work out the advantages within each group.
    3. One row a sample: prompt + new tokens, padded with 0; the mask is 1 on the new tokens, the stop included.
    4. policy_loss, backward, optimizer step. Where all advantages are zero nothing may change: leave the step out.
    """
    raise NotImplementedError
