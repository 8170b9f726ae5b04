"""The laws of chapter 10, and the mistakes that they must name."""

from typing import Any

import torch
from torch import Tensor, nn

from course.grading import Mutant

TITLE = "reinforcement learning"
PROVIDES = ("advantages", "policy_loss", "sample", "token_logprobs", "rl_step")
STOP, VOCABULARY = 0, 6


class Policy(nn.Module):
    """The next token depends on the present one: a table of logits, (V, V)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law_group_mean(m: Any) -> None:
    """The advantage is the reward minus the mean of its own group, not of the batch."""
    found = m.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
    assert tuple(found.shape) == (2, 4), f"rewards are (2, 4), advantages {tuple(found.shape)}"
    sums = found.sum(-1).tolist()
    assert max(map(abs, sums)) < 1e-5, (
        f"the advantages of each group sum to {sums}, not to 0: whose mean is subtracted?"
    )
    first = found[0].tolist()
    assert torch.allclose(found[0], torch.tensor([0.75, -0.25, -0.25, -0.25])), f"rewards 1 0 0 0 give {first}"


def law_equal_rewards(m: Any) -> None:
    """A group in which all earn the same teaches nothing: advantages of zero, and finite."""
    for value in (0.0, 1.0):
        found = m.advantages(torch.full((2, 4), value))
        assert torch.isfinite(found).all(), (
            f"all rewards {value}: advantages {found[0].tolist()}; a division by a deviation of 0?"
        )
        assert not found.any(), f"all rewards {value}: advantages {found[0].tolist()}, expected zeros"


def law_sign(m: Any) -> None:
    """A step against the gradient makes the better sample likelier, and the worse one less likely."""
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    m.policy_loss(logits.log_softmax(-1)[..., 1], torch.ones(2, 3), torch.tensor([1.0, -1.0])).backward()
    assert logits.grad is not None, "no gradient reaches the log-probabilities"
    better, worse = float(logits.grad[0, 0, 1]), float(logits.grad[1, 0, 1])
    assert better < 0 < worse, (
        f"the gradients of the chosen tokens' logits are {better:.3f} (better) and {worse:.3f} (worse): the sign"
    )


def law_only_sampled(m: Any) -> None:
    """Only what the policy sampled is trained: no prompt, no tool output, no padding."""
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    m.policy_loss(logits.log_softmax(-1)[..., 1], torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0])).backward()
    assert logits.grad is not None
    size = logits.grad.abs().sum(-1)[0].tolist()
    assert size[0] == size[1] == 0, f"the gradient by position is {size}; the first two are masked, and must have none"
    assert min(size[2:]) > 0, f"the gradient by position is {size}; the last two were sampled, the stop among them"


def law_tokens_weigh_the_same(m: Any) -> None:
    """Every sampled token weighs the same: one sum, divided by the number of sampled tokens of all rows."""
    logprobs, mask = -torch.ones(2, 4), torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    found = float(m.policy_loss(logprobs, mask, torch.tensor([1.0, 1.0])))
    assert abs(found - 1) < 1e-5, f"log p = -1 everywhere and advantage 1: the loss is 1, not {found:.3f}"
    found = float(m.policy_loss(logprobs, mask, torch.tensor([1.0, -1.0])))
    assert abs(found + 0.6) < 1e-5, (
        f"one token of advantage 1, four of -1: (1 - 4) / 5 = -0.6, not {found:.3f}; a mean of means gives 0"
    )


def law_logprobs(m: Any) -> None:
    """token_logprobs gives log p of each token given the one before it, 0.0 for the first."""
    policy, ids = Policy(), torch.tensor([[1, 2, 3], [4, 4, 5]])
    found = m.token_logprobs(policy, ids).detach()
    assert tuple(found.shape) == (2, 3), f"ids are (2, 3), log-probabilities {tuple(found.shape)}"
    table = policy.logits.detach().log_softmax(-1)
    expected = torch.stack((torch.zeros(2), table[ids[:, 0], ids[:, 1]], table[ids[:, 1], ids[:, 2]]), dim=1)
    worst = int((found - expected).abs().max(0).values.argmax())
    assert torch.allclose(found, expected, atol=1e-5), (
        f"position {worst}: {found[:, worst].tolist()}, expected {expected[:, worst].tolist()}; "
        "the logits at t predict the token at t + 1"
    )


def law_distribution(m: Any) -> None:
    """Samples come from the very distribution that is trained: the whole softmax at temperature 1."""
    policy, number = Policy(), 4000
    samples = m.sample(policy, [1], number, 1, STOP, _generator())
    assert len(samples) == number, f"{number} samples were asked for, {len(samples)} came"
    found = torch.bincount(torch.tensor([s[0] for s in samples]), minlength=VOCABULARY) / number
    expected = policy.logits.detach()[1].softmax(-1)
    worst = int((found - expected).abs().argmax())
    assert float((found - expected).abs().max()) < 0.04, (
        f"token {worst} was sampled {float(found[worst]):.3f} of the time, its probability is {float(expected[worst]):.3f}: "
        "with top-k or a temperature, what is trained is not what was sampled"
    )


def law_stop_kept(m: Any) -> None:
    """A sample ends with the stop token, which it keeps, or has max_new_tokens tokens."""
    for new in m.sample(Policy(), [1, 2], 64, 8, STOP, _generator()):
        assert len(new) <= 8, f"a sample has {len(new)} tokens, at most 8 were asked for"
        assert STOP not in new[:-1], f"the sample {new} goes on after the stop token {STOP}"
        assert new[-1] == STOP or len(new) == 8, f"the sample {new} ends without the stop token {STOP}: was it dropped?"


def _gradients(m: Any, prompt: list[int], number: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """One step at rate 0 that rewards stopping at once: its gradient, that of the formula, and the new tokens."""
    policy, drawn = Policy(), list[list[int]]()
    policy.logits.data[1, STOP] += 1  # so that some samples stop at once

    def reward(_: list[int], new: list[int]) -> float:
        drawn.append(new)
        return float(new[0] == STOP)

    m.rl_step(policy, torch.optim.SGD(policy.parameters(), lr=0.0), [prompt], reward, number, 1, STOP, _generator())
    assert policy.logits.grad is not None, "no gradient reached the policy's weights"
    assert len(drawn) == number, f"{number} samples were asked for, {len(drawn)} were scored"
    found, policy.logits.grad = policy.logits.grad.clone(), None
    first = torch.tensor([new[0] for new in drawn])
    rewards = (first == STOP).float()
    advantage = rewards - rewards.mean()
    chosen = policy.logits[prompt[-1]].log_softmax(-1)[first]
    (-(advantage * chosen).sum() / number).backward()
    assert policy.logits.grad is not None
    return found, policy.logits.grad, first


def law_stop_trained(m: Any) -> None:
    """Stopping is an action too: the stop token is trained like every other sampled token."""
    found, expected, first = _gradients(m, [1])
    stops = int((first == STOP).sum())
    apart = float((found - expected)[1, STOP].abs())
    assert apart < 1e-5, (
        f"{stops} of {len(first)} samples stopped at once; the gradient of that choice is {float(found[1, STOP]):.4f}, "
        f"by the formula {float(expected[1, STOP]):.4f}: do mask and sum hold the stop token, and N every sampled token?"
    )


def law_learns(m: Any) -> None:
    """The mean reward rises: from two prompts, the policy learns the token that each wants."""
    policy = Policy()
    optimizer, generator, means = torch.optim.SGD(policy.parameters(), lr=4.0), _generator(), []
    wanted = {1: 5, 2: 3}
    for _ in range(80):
        mean = m.rl_step(
            policy,
            optimizer,
            [[1], [2]],
            lambda prompt, new: float(new[0] == wanted[prompt[-1]]),
            16,
            2,
            STOP,
            generator,
        )
        means.append(mean)
    first, last = sum(means[:5]) / 5, sum(means[-10:]) / 10
    assert last > 0.9, f"the mean reward went {first:.2f} -> {last:.2f} in 80 steps; expected more than 0.9"


def law_prompt_untrained(m: Any) -> None:
    """The tokens of the prompt are read, not trained, and not counted in N."""
    found, expected, _ = _gradients(m, [4, 4, 4, 1])
    prompt = float(found[4].abs().max())
    assert prompt < 1e-6, (
        f"the logits after 4, which only the prompt holds, have a gradient of {prompt:.4f}, expected 0"
    )
    ratio = float((found[1] * expected[1]).sum() / expected[1].square().sum())
    assert abs(ratio - 1) < 1e-3, (
        f"the gradient is {ratio:.2f} times that of the formula. The prompts of a group cancel in the sum, "
        "since its advantages sum to 0, but not in N: count the sampled tokens alone"
    )


def law_nothing_to_learn(m: Any) -> None:
    """Where all rewards are equal the weights do not move, whatever momentum the optimizer holds."""
    policy = Policy()
    optimizer, generator = torch.optim.SGD(policy.parameters(), lr=1.0, momentum=0.9), _generator()
    rewards = iter([1.0, 0.0] * 20)
    m.rl_step(policy, optimizer, [[1]], lambda *_: next(rewards), 4, 1, STOP, generator)
    before = policy.logits.detach().clone()
    mean = m.rl_step(policy, optimizer, [[1]], lambda *_: 1.0, 4, 1, STOP, generator)
    moved = float((policy.logits.detach() - before).abs().max())
    assert moved == 0, (
        f"all rewards were 1, and the weights moved by {moved:.3f}: momentum goes on; leave such a step out"
    )
    assert mean == 1.0, f"the mean reward is {mean}, expected 1.0"


def law_gradients_are_fresh(m: Any) -> None:
    """A step does not add to the gradients of the one before."""
    policy, other = Policy(), Policy()
    rewards = iter([1.0, 0.0] * 20)
    for steps, each in ((2, policy), (1, other)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0)
        for step in range(steps):
            m.rl_step(each, optimizer, [[1]], lambda *_: next(rewards), 4, 1, STOP, _generator(step + 2 - steps))
    assert policy.logits.grad is not None
    assert other.logits.grad is not None
    apart = float((policy.logits.grad - other.logits.grad).abs().max())
    assert apart < 1e-6, (
        f"after two steps at rate 0 the gradient differs by {apart:.3f} from that of the second alone: zero it first"
    )


MUTANTS = [
    Mutant("the sign", "return -(logprobs", "return (logprobs", "sign"),
    Mutant("mean over the batch", "rewards.mean(-1, keepdim=True)", "rewards.mean()", "group_mean"),
    Mutant("divided by the deviation without a floor", "return rewards - rewards.mean(-1, keepdim=True)", "centered = rewards - rewards.mean(-1, keepdim=True)\n    return centered / rewards.std(-1, keepdim=True)", "equal_rewards"),
    Mutant("mask forgotten", "logprobs * mask * advantage", "logprobs * advantage", "only_sampled"),
    Mutant("mean of means", ".sum() / mask.sum().clamp(min=1)", ".sum(-1).div(mask.sum(-1)).mean()", "tokens_weigh_the_same"),
    Mutant("log-probabilities not shifted", "chosen = logprobs.gather(-1, ids[:, 1:, None])", "chosen = logprobs.gather(-1, ids[:, :-1, None])", "logprobs"),
    Mutant("sampled with top-k", "probs = policy(ids)[:, -1].softmax(-1)", "logits = policy(ids)[:, -1]\n        probs = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -1e9).softmax(-1)", "distribution"),
    Mutant("sampled at a temperature", "policy(ids)[:, -1].softmax(-1)", "(policy(ids)[:, -1] / 0.6).softmax(-1)", "distribution"),
    Mutant("stop token dropped", "                samples[i].append(token)\n                live[i] = token != stop", "                live[i] = token != stop\n                if live[i]:\n                    samples[i].append(token)", "stop_kept"),
    Mutant("stop token not trained", "mask[row, len(prompt) : len(prompt) + len(new)] = 1", "mask[row, len(prompt) : len(prompt) + len(new)] = 1\n        mask[row, len(prompt) + len(new) - 1] = 0", "stop_trained"),
    Mutant("prompt trained", "mask[row, len(prompt) :", "mask[row, 0 :", "prompt_untrained"),
    Mutant("an empty step taken", "if advantage.any():", "if True:", "nothing_to_learn"),
    Mutant("gradients add up", "        optimizer.zero_grad()\n", "", "gradients_are_fresh"),
]  # fmt: skip
