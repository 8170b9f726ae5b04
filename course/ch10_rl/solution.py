"""The plain solution of chapter 10: rollout, score, advantage, step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def advantages(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(-1, keepdim=True)


def policy_loss(logprobs: Tensor, mask: Tensor, advantage: Tensor) -> Tensor:
    return -(logprobs * mask * advantage[:, None]).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def sample(
    policy: nn.Module, prompt: list[int], num_samples: int, max_new_tokens: int, stop: int, generator: torch.Generator
) -> list[list[int]]:
    ids = torch.tensor([prompt] * num_samples)  # (K, T)
    live = [True] * num_samples
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    for _ in range(max_new_tokens):
        probs = policy(ids)[:, -1].softmax(-1)  # (K, V)
        chosen = torch.multinomial(probs, 1, generator=generator)  # (K, 1)
        ids = torch.cat((ids, chosen), dim=1)
        for i, token in enumerate(chosen[:, 0].tolist()):
            if live[i]:
                samples[i].append(token)
                live[i] = token != stop
        if not any(live):
            break
    return samples


def token_logprobs(policy: nn.Module, ids: Tensor) -> Tensor:
    logprobs = policy(ids[:, :-1]).log_softmax(-1)  # (B, T-1, V): position t predicts token t + 1
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat((torch.zeros(len(ids), 1), chosen), dim=1)


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
    groups = [sample(policy, prompt, num_samples, max_new_tokens, stop, generator) for prompt in prompts]
    rewards = torch.tensor([[reward(prompt, s) for s in group] for prompt, group in zip(prompts, groups, strict=True)])
    advantage = advantages(rewards).flatten()  # (P K,)
    rows = [(prompt, new) for prompt, group in zip(prompts, groups, strict=True) for new in group]
    longest = max(len(prompt) + len(new) for prompt, new in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest)
    for row, (prompt, new) in enumerate(rows):
        ids[row, : len(prompt) + len(new)] = torch.tensor(prompt + new)
        mask[row, len(prompt) : len(prompt) + len(new)] = 1
    if advantage.any():
        optimizer.zero_grad()
        policy_loss(token_logprobs(policy, ids), mask, advantage).backward()
        optimizer.step()
    return float(rewards.mean())
