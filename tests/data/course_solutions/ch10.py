"""My RL."""

import torch
import torch.nn.functional as F


def advantages(rewards):
    return rewards - torch.einsum("pk->p", rewards)[:, None] / rewards.shape[1]


def policy_loss(logprobs, mask, advantage):
    return -torch.einsum("bt,bt,b->", logprobs, mask.to(logprobs), advantage) / mask.sum()


@torch.no_grad()
def sample(policy, prompt, num_samples, max_new_tokens, stop, generator):
    def one():
        new = []
        while len(new) < max_new_tokens and stop not in new:
            logits = policy(torch.tensor([prompt + new]))[0, -1]
            new.append(torch.multinomial(logits.softmax(-1), 1, generator=generator).item())
        return new

    return [one() for _ in range(num_samples)]


def token_logprobs(policy, ids):
    logits = policy(ids[:, :-1])
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return F.pad(-nll.view(len(ids), -1), (1, 0))


def rl_step(policy, optimizer, prompts, reward, num_samples, max_new_tokens, stop, generator):
    groups = [sample(policy, p, num_samples, max_new_tokens, stop, generator) for p in prompts]
    rewards = torch.tensor([[reward(p, s) for s in g] for p, g in zip(prompts, groups, strict=True)])
    adv = advantages(rewards)
    n = sum(len(s) for g in groups for s in g)
    optimizer.zero_grad()
    if (adv == 0).all():
        return float(rewards.mean())
    for p, g, aa in zip(prompts, groups, adv.tolist(), strict=True):
        for s, a in zip(g, aa, strict=True):
            lp = token_logprobs(policy, torch.tensor([p + s]))[0, len(p) :]
            (-a * lp.sum() / n).backward()
    optimizer.step()
    return float(rewards.mean())
