"""Chapter 10: the policy gradient on exactly what was sampled, and the choices of the literature around it."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from test_04_model import random_gpt

from edu.chat.chat_format import calculator_tool, render_prompt
from edu.config.rl import Advantage, Normalization, RLConfig
from edu.data.packing import Batch, TrainingExample, collate
from edu.data.tokenizer import Tokenizer
from edu.inference.engine import Engine
from edu.inference.params import Sample
from edu.stages import rl
from edu.stages.objective import advantages, length_weight, normalizer, surrogate
from edu.stages.rollouts import (
    Rollout,
    assemble,
    draw,
    filter_by_length,
    lay_out,
    roll_out,
    show_group,
    summarize,
    token_logprobs,
)
from edu.tasks.gsm8k import GSM8K
from edu.tasks.score import grade_one_by_one
from edu.tasks.task import Subset
from edu.tasks.trl import TRLGrader
from edu.training.optimizer import MuonAdamW
from edu.training.step import Term, train_step

T = 32
ADVANTAGES, NORMALIZATIONS = get_args(Advantage), get_args(Normalization)
DOCS = Path(__file__).parents[1] / "docs"


def rollout(tokens: list[int], mask: list[int], reward: float, advantage: float, reason: str = "stop") -> Rollout:
    return Rollout([5, 6], Sample(tokens, mask, [-1.0 * m for m in mask], reason), reward, advantage)


def gradients(
    model: torch.nn.Module, rows: list[TrainingExample] | list[Batch], left_out: int = 0
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients of a step, before any clipping, and its loss."""
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    kept: dict[str, torch.Tensor] = {}

    class Keeps(MuonAdamW):
        def step(self, closure: None = None) -> None:
            assert closure is None
            kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    group = {"kind": "adamw", "lr": 0.0, "betas": (0.9, 0.9), "eps": 1.0, "weight_decay": 0.0}
    prepared, optimizer = accelerator.prepare(model, Keeps([group | {"params": list(model.parameters())}]))
    batches = [row if isinstance(row, Batch) else collate([[row]], T) for row in rows]
    result = train_step(accelerator, prepared, optimizer, [Term(batches, left_out=left_out)], clip=1e9)
    return kept, result.losses[0]


class TwoTokens(torch.nn.Module):
    """A policy with one parameter: token 1 has probability sigmoid(theta) everywhere, token 0 the rest."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta))

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        assert inputs.shape == position_ids.shape
        logprobs = torch.stack((torch.zeros(()), self.theta)).log_softmax(0)
        return (weights * torch.where(targets >= 0, logprobs[targets.clamp(min=0)], 0.0)).sum()


def test_the_gradient_of_two_tokens_is_the_one_worked_out_by_hand() -> None:
    # d log p(1) = 1 - p and d log p(0) = -p. "1 1" earned 1 and "0" nothing, so A = 1/2 and -1/2, and N = 3 tokens:
    # -(1/2 * 2 (1 - p) - 1/2 * -p) / 3 = -(1 - p / 2) / 3, and p = 3/4 makes it -5/24.
    pieces = [rollout(tokens, [1] * len(tokens), 0.0, a).piece for tokens, a in (([1, 1], 0.5), ([0], -0.5))]
    found, _ = gradients(TwoTokens(math.log(3)), pieces)
    assert float(found["theta"]) == pytest.approx(-5 / 24)


def test_the_gradient_of_a_model_is_reinforce_token_by_token() -> None:
    model = random_gpt()
    rollouts = [rollout([7, 8, 9], [1, 0, 1], 1.0, 0.75), rollout([9, 4], [1, 1], 0.0, -0.25)]
    found, loss = gradients(model, [r.piece for r in rollouts])
    total = torch.zeros(())
    for r in rollouts:
        logprobs = model(torch.tensor([r.prompt + r.sample.tokens])).logits[0].log_softmax(-1)
        for i, (token, sampled) in enumerate(zip(r.sample.tokens, r.sample.mask, strict=True)):
            total = total - sampled * r.advantage * logprobs[len(r.prompt) - 1 + i, token]
    expected = torch.autograd.grad(total / 4, list(model.parameters()))  # four tokens were sampled, one was forced
    assert loss == pytest.approx(float(total.detach()) / 4, abs=1e-5)
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_equal_rewards_give_no_gradient() -> None:
    pieces = [rollout([7, 8], [1, 1], 1.0, advantage).piece for advantage in advantages([1.0, 1.0])]
    found, loss = gradients(random_gpt(), pieces)
    assert loss == 0
    assert all(float(g.abs().max()) == 0 for g in found.values())


def test_leaving_rollouts_without_advantage_out_changes_nothing() -> None:
    useful = [rollout([7, 8, 9], [1, 1, 1], 1.0, 0.5).piece, rollout([3], [1], 0.0, -0.5).piece]
    idle = [rollout([4, 5, 6, 7], [1, 1, 0, 1], 0.0, 0.0).piece]
    whole, loss = gradients(random_gpt(), useful + idle)
    short, same = gradients(random_gpt(), useful, left_out=3)
    assert loss == pytest.approx(same)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, short[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero(kind: Advantage) -> None:
    assert sum(advantages([1.0, 0.0, 0.25, 1.0, 0.0], kind)) == pytest.approx(0)
    assert advantages([0.1, 0.1, 0.1], kind) == [0.0, 0.0, 0.0]


def test_advantages_are_those_of_the_papers() -> None:
    rewards = [1.0, 0.0, 0.0, 0.5]
    mean, deviation = 0.375, np.std(rewards, ddof=1)
    assert advantages(rewards) == pytest.approx([r - mean for r in rewards])
    assert advantages(rewards, "mean_std") == pytest.approx([(r - mean) / deviation for r in rewards], rel=1e-3)
    assert advantages(rewards, "leave_one_out") == pytest.approx([1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3])


# The estimate against the truth, on a policy whose every outcome can be listed


class Toy:
    """Answers of up to two tokens from a policy with three parameters, one for each state: start, after 0, after 1."""

    def __init__(self, outcomes: dict[tuple[int, ...], float]) -> None:
        self.rewards = outcomes
        self.theta = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
        self.logprobs = {}
        for tokens in outcomes:
            states = [0, *(1 + token for token in tokens[:-1])]
            chosen = [
                torch.nn.functional.logsigmoid(self.theta[state] * (1 if token else -1))
                for state, token in zip(states, tokens, strict=True)
            ]
            self.logprobs[tokens] = torch.stack(chosen).sum()
        self.probabilities = {tokens: float(logprob.detach().exp()) for tokens, logprob in self.logprobs.items()}
        assert sum(self.probabilities.values()) == pytest.approx(1)

    def gradient(self, weights: dict[tuple[int, ...], float]) -> torch.Tensor:
        total = sum((weight * self.logprobs[tokens] for tokens, weight in weights.items()), torch.zeros(()))
        (found,) = torch.autograd.grad(total, [self.theta], retain_graph=True)
        return found

    def truth(self) -> torch.Tensor:
        """The gradient of the expected reward."""
        return self.gradient({tokens: p * self.rewards[tokens] for tokens, p in self.probabilities.items()})

    def expected(self, samples: int, advantage: Advantage, normalization: Normalization) -> torch.Tensor:
        """The mean of the update's direction over every group of so many answers that can be sampled."""
        weights = dict.fromkeys(self.rewards, 0.0)
        for group in product(self.rewards, repeat=samples):
            chance = math.prod(self.probabilities[tokens] for tokens in group)
            rated = advantages([self.rewards[tokens] for tokens in group], advantage)
            count = normalizer([len(tokens) for tokens in group], normalization, longest=2)
            for tokens, a in zip(group, rated, strict=True):
                weights[tokens] += chance * a * length_weight(len(tokens), normalization) / count
        return self.gradient(weights)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_with_answers_of_one_length_the_estimate_is_unbiased(samples: int, normalization: Normalization) -> None:
    toy = Toy({(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.3, (1, 1): 0.0})
    per_token = toy.truth() / 2
    left = toy.expected(samples, "leave_one_out", normalization)
    torch.testing.assert_close(left, per_token, atol=1e-12, rtol=0)
    mean = toy.expected(samples, "mean", normalization)
    torch.testing.assert_close(mean, per_token * (samples - 1) / samples, atol=1e-12, rtol=0)


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """In degrees."""
    return math.degrees(math.acos(min(1.0, float(torch.nn.functional.cosine_similarity(a, b, dim=0)))))


def test_with_answers_of_many_lengths_only_the_constant_is_unbiased_and_the_page_says_by_how_much() -> None:
    toy = Toy({(0,): 0.0, (1, 0): 1.0, (1, 1): 0.0})  # an answer ends with its first 0, or is cut off
    exact = toy.expected(4, "leave_one_out", "constant")
    torch.testing.assert_close(exact, toy.truth() / 2, atol=1e-12, rtol=0)
    page = (DOCS / "rl.md").read_text()
    for kind in NORMALIZATIONS:
        found = angle(toy.expected(4, "mean", kind), toy.truth())
        shown = re.search(rf"^\| `{kind}` \|.*\| ([0-9.]+)° \|$", page, re.MULTILINE)
        assert shown, f"docs/rl.md has no row of {kind}"
        assert float(shown[1]) == pytest.approx(found, abs=0.05), kind
        assert (found > 1) == (kind != "constant")
    smaller = [f"{angle(toy.expected(samples, 'mean', 'token'), toy.truth()):.1f}°" for samples in (2, 4, 8)]
    assert "{}, {} and {} with two, four and eight".format(*smaller) in page


# Ratio clipping and KL


@pytest.mark.parametrize(
    ("advantage", "ratio", "weight"),
    [(1, 1, 1), (-1, 1, -1), (1, 1.27, 1.27), (1, 1.5, 0), (-1, 1.5, -1.5), (1, 0.5, 0.5), (-1, 0.5, 0), (0, 3, 0)],
)
def test_clipping_stops_a_token_only_where_it_has_gone_its_way(advantage: float, ratio: float, weight: float) -> None:
    logprobs = np.log([[0.2 * ratio], [0.2], [0.2 * ratio]])
    found = surrogate(advantage, *logprobs, low=0.2, high=0.28, kl=0.0)
    assert found.weights.tolist() == pytest.approx([weight])
    assert found.clipped.tolist() == [weight == 0 and advantage != 0]


def test_the_kl_of_a_token_is_k3() -> None:
    # reference / policy = 2: k3 = 2 - ln 2 - 1, and its weight pulls up by 2 - 1
    found = surrogate(0.0, *np.log([[0.2], [0.2], [0.4]]), low=0.2, high=0.2, kl=0.1)
    assert found.kl.tolist() == pytest.approx([1 - math.log(2)])
    assert found.weights.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("advantage", [-0.7, 0.3])
def test_the_weights_have_the_gradient_of_the_textbook_loss(advantage: float) -> None:
    old, moved, reference = np.random.default_rng(0).normal(-2, 0.4, (3, 500))
    now = torch.tensor(moved, requires_grad=True)
    ratio, apart = (now - torch.tensor(old)).exp(), torch.tensor(reference) - now
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage)
    (textbook,) = torch.autograd.grad(-(gain - 0.05 * (apart.exp() - apart - 1)).sum(), [now])
    found = surrogate(advantage, moved, old, reference, low=0.2, high=0.28, kl=0.05)
    assert 0 < found.clipped.mean() < 1
    torch.testing.assert_close(-torch.tensor(found.weights), textbook)


def test_at_ratio_one_the_clipped_weights_are_the_plain_ones() -> None:
    same = np.random.default_rng(0).normal(-2, 1, 100)
    for advantage in (-0.25, 0.0, 0.75):
        found = surrogate(advantage, same, same, same, low=0.2, high=0.28, kl=0.1)
        assert found.weights.tolist() == [advantage] * 100
        assert not found.clipped.any()
        assert not found.kl.any()


def test_log_probabilities_of_packed_rollouts_are_those_of_each_alone() -> None:
    model = random_gpt()
    rollouts = [
        rollout([7, 8, 9, 4], [1, 0, 1, 1], 1.0, 0.5),
        rollout([9, 4], [1, 1], 0.0, -0.5),
        rollout([3] * 28, [1] * 28, 0.0, 0.0),
    ]
    found = token_logprobs(model, [r.piece for r in rollouts], T, batch_size=1)
    for r, logprobs in zip(rollouts, found, strict=True):
        ids = torch.tensor([r.prompt + r.sample.tokens])
        alone = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).detach()
        expected = [0.0] + [
            float(p) * m for p, m in zip(alone, [*[0] * (len(r.prompt) - 1), *r.sample.mask], strict=True)
        ]
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def some_answers(seed: int) -> list[TrainingExample]:
    """Answers of many lengths to four prompts, in which tools forced tokens too; equal prompts are neighbours."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(4):
        prompt = rng.integers(0, 400, rng.integers(1, 9)).tolist()
        for _ in range(rng.integers(1, 6)):
            ids = rng.integers(0, 400, rng.integers(1, T + 2 - len(prompt))).tolist()
            mask = [1, *rng.integers(0, 2, len(ids) - 1).tolist()]
            pieces.append(TrainingExample(prompt + ids, [0] * len(prompt) + mask, float(rng.normal())))
    return pieces


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_stands_in_one_row_and_no_row_is_too_long(seed: int) -> None:
    pieces = some_answers(seed)
    parts = lay_out(pieces, T, batch_size=2)
    assert sorted(i for part in parts for row in part for bundle in row for i in bundle) == list(range(len(pieces)))
    for part in parts:
        batch = assemble(part, pieces)
        assert len(batch.inputs) <= 2
        assert batch.inputs.shape[1] <= T
        kept = [np.sort(np.concatenate([np.asarray(pieces[i].ids)[1:][np.asarray(pieces[i].mask)[1:] == 1]
                for bundle in row for i in bundle])).tolist() for row in part]  # fmt: skip
        assert [sorted(line[line >= 0].tolist()) for line in batch.targets] == kept


def test_a_prompt_computed_once_for_its_answers_gives_the_gradient_of_each_alone() -> None:
    pieces = some_answers(seed=1)
    alone, loss = gradients(random_gpt(), pieces)
    parts = lay_out(pieces, T, batch_size=2)
    assert any(len(bundle) > 1 for part in parts for row in part for bundle in row)
    together, same = gradients(random_gpt(), [assemble(part, pieces) for part in parts])
    assert loss == pytest.approx(same, abs=1e-6)
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, together[name], atol=1e-6, rtol=1e-4, msg=name)


# Rollouts


@pytest.fixture(scope="module")
def task() -> GSM8K:
    made = GSM8K.__new__(GSM8K)
    chat = [{"role": "user", "content": "1+1?"}]
    made.examples = [
        {"messages": chat, "answer": "2"},
        {"messages": [{"role": "user", "content": "1+1? " * 40}], "answer": "2"},
    ]
    return made


def test_rollouts_train_what_was_sampled_the_stop_token_included(tokenizer: Tokenizer, task: GSM8K) -> None:
    model = random_gpt(vocab_size=tokenizer.vocab_size)
    options = {"num_samples": 16, "max_new_tokens": 8}
    (group,) = roll_out(Engine(model), tokenizer, grade_one_by_one(task), [task.get_example(0)], [3], **options)
    prompt = render_prompt(task.get_example(0)["messages"], tokenizer)
    for each in group:
        assert each.prompt == prompt
        assert list(each.piece.ids) == prompt + each.sample.tokens
        assert list(each.piece.mask) == [0] * len(prompt) + each.sample.mask
        assert all(each.sample.mask)
    cut = Rollout(prompt, Sample([1, 2], [1, 1], [0.0, 0.0], "length"), 0.0, 0.0)
    assert show_group([cut], tokenizer)[0]["finish_reason"] == "length"
    figures = summarize([[cut, cut]])
    assert figures["completions/clipped_ratio"] == 1
    assert figures["frac_reward_zero_std"] == 1
    right = Rollout(prompt, Sample([1], [1], [-2.0], "stop"), 1.0, 1.0)
    figures = summarize([[cut, cut], [right, right], [right, cut]])
    assert figures == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": math.sqrt(6 * 0.25 / 5),
            "frac_reward_zero_std": 2 / 3,
            "completions/mean_length": 1.5,
            "completions/clipped_ratio": 0.5,
            "entropy": 3 * 2.0 / 9,
        }
    )


def test_the_log_probabilities_trained_are_those_sampled_from_the_stop_token_too(
    tokenizer: Tokenizer, task: GSM8K
) -> None:
    model = random_gpt(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.lm_head.weight *= 0.3  # flat enough for some answers to end
    (group,) = roll_out(
        Engine(model), tokenizer, grade_one_by_one(task), [task.get_example(0)], [3], num_samples=128, max_new_tokens=16
    )
    assert {r.sample.finish_reason for r in group} >= {"stop", "length"}
    trained = token_logprobs(model, [r.piece for r in group], 3 * T, batch_size=4)
    for r, logprobs in zip(group, trained, strict=True):
        assert logprobs[len(r.prompt) :].tolist() == pytest.approx(r.sample.logprobs, abs=1e-4)
        assert r.piece.mask[-1] == 1


def test_a_tool_call_in_a_rollout_is_answered_and_its_answer_not_trained(tokenizer: Tokenizer) -> None:
    called = [tokenizer.python_start, *tokenizer.encode("7*6"), tokenizer.python_end]
    forced = calculator_tool(tokenizer)(called)
    assert tokenizer.decode(forced, skip_special=True) == "42"
    piece = rollout(called + forced, [1] * len(called) + [0] * len(forced), 1.0, 0.5).piece
    batch = collate([[piece]], T)
    trained = batch.targets[0][batch.targets[0] >= 0].tolist()
    assert trained == called


def test_problems_that_do_not_fit_are_left_out_and_counted(tokenizer: Tokenizer, task: GSM8K) -> None:
    kept, left_out = filter_by_length(task, tokenizer, room=60)
    assert (len(kept), left_out) == (1, 1)
    assert isinstance(kept, Subset)
    with pytest.raises(ValueError, match="no problem leaves room for an answer"):
        filter_by_length(task, tokenizer, room=2)


def test_every_epoch_draws_each_problem_once() -> None:
    drawn = [i for step in range(10) for i in draw(12, seed=5, first=step * 6, number=6)]
    assert [sorted(drawn[at : at + 12]) for at in range(0, 60, 12)] == [list(range(12))] * 5
    assert drawn[:12] != drawn[12:24]


# The steps


def reinforcement(config: RLConfig, tokenizer: Tokenizer, task: GSM8K) -> rl.Reinforcement:
    model = random_gpt(vocab_size=tokenizer.vocab_size)
    training: Any = SimpleNamespace(model=model)
    accelerator = Accelerator(cpu=True)
    return rl.Reinforcement(config, accelerator, tokenizer, None, training, Subset(task, [0] * 12), None, None, None, T)  # type: ignore[arg-type]


def scripted(monkeypatch: pytest.MonkeyPatch, telling: Sequence[bool]) -> list[int]:
    """Rollouts of which the places listed have unequal rewards; gives the seeds asked for."""
    seeds: list[int] = []

    def roll_out(*args: Any, **options: Any) -> list[list[Rollout]]:
        groups = []
        for seed in args[4]:
            rewards = [1.0, 0.0] if telling[len(seeds) % len(telling)] else [0.0, 0.0]
            rated = zip(rewards, advantages(rewards, options["advantage"]), strict=True)
            groups.append([rollout([7, 8], [1, 1], reward, a) for reward, a in rated])
            seeds.append(seed)
        return groups

    monkeypatch.setattr(rl, "roll_out", roll_out)
    return seeds


def test_dynamic_sampling_trains_only_groups_with_a_signal(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, task: GSM8K
) -> None:
    plain = RLConfig(batch_size=4, samples=2, max_new_tokens=8)
    dynamic = RLConfig(batch_size=4, samples=2, max_new_tokens=8, dynamic_sampling=True)
    for config, telling, asked, kept in (
        (plain, [True, False], 4, 4),
        (dynamic, [True, False], 8, 4),
        (dynamic, [True, False, True, True], 8, 4),  # six would do: the last two are left out
        (dynamic, [True], 4, 4),
        (dynamic, [False, False, False, True], 16, 4),
        (dynamic, [False], 16, 0),
    ):
        seeds = scripted(monkeypatch, telling)
        sampled, found = reinforcement(config, tokenizer, task).sample(step=3)
        assert (len(sampled), len(found), len(set(seeds))) == (asked, kept, asked)
        assert config is plain or all(any(r.advantage for r in group) for group in found)


@pytest.mark.parametrize(("normalization", "count"), [("token", 16), ("sequence", 8), ("constant", 64)])
def test_the_normalisation_sets_n_and_the_share_of_a_token(
    normalization: Normalization, count: int, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, task: GSM8K
) -> None:
    config = RLConfig(batch_size=4, samples=2, max_new_tokens=8, normalization=normalization)
    scripted(monkeypatch, [True, False])
    steps = reinforcement(config, tokenizer, task)
    _, groups = steps.sample(step=0)
    (((term,), _),) = steps.terms(0, [r for group in groups for r in group])
    assert (term.count, term.left_out) == (count, 8)
    weights = torch.cat([batch.weights.flatten() for batch in term.batches])
    share = 0.5 if normalization == "sequence" else 1.0
    assert sorted(weights[weights != 0].tolist()) == [-0.5 * share] * 4 + [0.5 * share] * 4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_parts_of_two_processes_add_up_to_the_step_of_one(
    normalization: Normalization, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, task: GSM8K
) -> None:
    config = RLConfig(batch_size=5, samples=2, max_new_tokens=8, normalization=normalization)

    def answers(*args: Any, **_: Any) -> list[list[Rollout]]:  # of its own for every problem, so of many lengths
        tokens = [[1 + seed % 97] * (1 + seed % 7) for seed in args[4]]
        return [[rollout(t, [1] * len(t), 0.0, a) for a in (0.5, -0.5)] for t in tokens]

    monkeypatch.setattr(rl, "roll_out", answers)

    def term(process: int, world: int) -> Term:
        accelerator: Any = Accelerator(cpu=True)
        steps = reinforcement(config, tokenizer, task)
        parallel = SimpleNamespace(
            process_index=process, num_processes=world, unwrap_model=accelerator.unwrap_model, device="cpu"
        )
        steps = replace(steps, accelerator=parallel)  # type: ignore[arg-type]
        (((found,), _),) = steps.terms(0, [r for group in steps.sample(0)[1] for r in group])
        return found

    def trained(*terms: Term) -> list[tuple[int, float]]:
        batches = [batch for each in terms for batch in each.batches]
        pairs = [
            p for b in batches for p in zip(b.targets.flatten().tolist(), b.weights.flatten().tolist(), strict=True)
        ]
        return sorted(pair for pair in pairs if pair[1])

    one, first, second = term(0, 1), term(0, 2), term(1, 2)
    assert trained(one) == trained(first, second)
    assert one.count == (first.count or 0) + (second.count or 0)
    assert (first.count, second.count) != (one.count, 0)


def test_later_updates_on_the_same_rollouts_are_clipped(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, task: GSM8K
) -> None:
    config = RLConfig(batch_size=4, samples=2, max_new_tokens=8, epochs=3)
    scripted(monkeypatch, [True])
    steps = reinforcement(config, tokenizer, task)
    _, groups = steps.sample(step=0)
    seen = []
    for (term,), figures in steps.terms(0, [r for group in groups for r in group]):
        weights = torch.cat([batch.weights.flatten() for batch in term.batches])
        seen.append((set(weights[weights != 0].tolist()), figures["clip_ratio/region_mean"]))
        with torch.no_grad():
            steps.training.model.lm_head.weight[7:9] *= 3
    assert seen[0] == ({0.5, -0.5}, 0.0)
    assert seen[1][0] != seen[0][0]
    assert 0 < seen[2][1] < 1
    assert "kl" not in figures


@pytest.mark.parametrize(("telling", "step", "said"), [(False, 1, True), (True, 1, False), (False, 5, False)])
def test_a_reward_that_is_equal_for_every_answer_of_the_first_steps_is_said(
    telling: bool, step: int, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tokenizer: Tokenizer, task: GSM8K,
) -> None:  # fmt: skip
    scripted(monkeypatch, [telling])
    list(reinforcement(RLConfig(batch_size=4, samples=2, eval_every=100), tokenizer, task).updates(step))
    found = capsys.readouterr().out
    assert ("step 1: every answer earned 0, so there is nothing to learn from" in found) == said


def test_a_reward_function_grades_a_step_in_one_call_and_what_it_logs_is_kept(
    tokenizer: Tokenizer, task: GSM8K
) -> None:
    calls = []

    def mine(completions: list, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        log_extra("number", list(range(len(completions))))
        log_metric("asked", len(completions))
        return list(range(len(completions)))

    model = random_gpt(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.lm_head.weight *= 0.3
    examples = [task.get_example(0)] * 2
    grader = TRLGrader(mine).grade
    groups = roll_out(Engine(model), tokenizer, grader, examples, [3, 4], num_samples=64, max_new_tokens=32)
    finished = [r for group in groups for r in group if r.sample.finish_reason == "stop"]
    assert calls == [len(finished)]
    assert len(finished) > 1
    assert [r.reward for r in finished] == list(range(len(finished)))
    assert summarize(groups)["reward/asked"] == len(finished)
    shown = [row for group in groups for row in show_group(group, tokenizer) if row["finish_reason"] == "stop"]
    assert [row["number"] for row in shown] == list(range(len(finished)))


def test_settings_without_effect_or_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="--clip-high: nothing is clipped in one update"):
        RLConfig(clip_high=0.3)
    with pytest.raises(ValueError, match=r"--kl -1\.0: must be greater than or equal to 0"):
        RLConfig(kl=-1.0)
    with pytest.raises(ValueError, match="--advantage median: must be 'mean', 'mean_std' or 'leave_one_out'"):
        RLConfig(advantage="median")  # type: ignore[arg-type]
