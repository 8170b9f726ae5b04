"""Chapter 10: the policy gradient on exactly what was sampled."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from test_04_model import random_gpt

from edu.chat import calculator_tool, render_prompt
from edu.engine import Engine
from edu.model import GPT
from edu.optim import MuonAdamW
from edu.packing import Piece, collate, pack_rows
from edu.rollouts import Rollout, advantages, draw, fitting, roll_out, summarise
from edu.sampling import Sample
from edu.step import Term, train_step
from edu.tasks import Subset
from edu.tasks.gsm8k import GSM8K
from edu.tokenizer import Tokenizer

T = 32


def rollout(tokens: list[int], mask: list[int], reward: float, advantage: float, reason: str = "stop") -> Rollout:
    return Rollout([5, 6], Sample(tokens, mask, [-1.0 * m for m in mask], reason), reward, advantage)


def gradients(model: GPT, pieces: list[Piece], left_out: int = 0) -> tuple[dict[str, torch.Tensor], float]:
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
    rows = [[pieces[i] for i in row] for row in pack_rows(pieces, T)] or [[]]
    result = train_step(accelerator, prepared, optimizer, [Term([collate(rows, T)], left_out=left_out)], clip=1e9)
    return kept, result.losses[0]


def test_the_gradient_is_reinforce_by_hand() -> None:
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
        torch.testing.assert_close(gradient, short[name], atol=1e-7, rtol=1e-5)


def test_advantages_of_a_group_sum_to_zero() -> None:
    assert sum(advantages([1.0, 0.0, 0.0, 1.0, 0.0])) == pytest.approx(0)
    assert advantages([0.0, 0.0]) == [0.0, 0.0]


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
    (group,) = roll_out(Engine(model), tokenizer, task, [task.get_example(0)], [3], **options)
    prompt = render_prompt(task.get_example(0)["messages"], tokenizer)
    for each in group:
        assert each.prompt == prompt
        assert list(each.piece.ids) == prompt + each.sample.tokens
        assert list(each.piece.mask) == [0] * len(prompt) + each.sample.mask
        assert all(each.sample.mask)
    cut = Rollout(prompt, Sample([1, 2], [1, 1], [0.0, 0.0], "length"), 0.0, 0.0)
    figures = summarise([[cut, cut]])
    assert figures["completions/clipped_ratio"] == 1
    assert figures["frac_reward_zero_std"] == 1


def test_a_tool_call_in_a_rollout_is_answered_and_its_answer_not_trained(tokenizer: Tokenizer) -> None:
    called = [tokenizer.python_start, *tokenizer.encode("7*6"), tokenizer.python_end]
    forced = calculator_tool(tokenizer)(called)
    assert tokenizer.decode(forced, skip_special=True) == "42"
    piece = rollout(called + forced, [1] * len(called) + [0] * len(forced), 1.0, 0.5).piece
    batch = collate([[piece]], T)
    trained = batch.targets[0][batch.targets[0] >= 0].tolist()
    assert trained == called


def test_problems_that_do_not_fit_are_left_out_and_counted(tokenizer: Tokenizer, task: GSM8K) -> None:
    kept, left_out = fitting(task, tokenizer, room=60)
    assert (len(kept), left_out) == (1, 1)
    assert isinstance(kept, Subset)
    with pytest.raises(ValueError, match="no problem leaves room for an answer"):
        fitting(task, tokenizer, room=2)


def test_every_epoch_draws_each_problem_once() -> None:
    drawn = [i for step in range(10) for i in draw(12, seed=5, first=step * 6, number=6)]
    assert [sorted(drawn[at : at + 12]) for at in range(0, 60, 12)] == [list(range(12))] * 5
    assert drawn[:12] != drawn[12:24]
