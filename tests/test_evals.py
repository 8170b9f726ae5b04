"""Measurements: statistics against known values, and evaluations with a fake engine whose answers are written down."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edu.chat.chat_format import render, render_prompt
from edu.chat.mixture import conversation
from edu.data.packing import Batch, TrainingExample, collate
from edu.data.tokenizer import Tokenizer
from edu.evaluation import evals, suite
from edu.evaluation.bits_per_byte import bits_per_byte, evaluate_text, ngram_bits_per_byte, text_nats
from edu.evaluation.comparison import compare, compare_records, read_records, save, sign_test
from edu.evaluation.evals import (
    evaluate_facts,
    evaluate_persona,
    evaluate_task,
    summarise_facts,
    summarise_persona,
    summarise_task,
)
from edu.evaluation.statistics import bootstrap_over_problems, pass_at_k, wilson
from edu.inference.engine import Engine
from edu.inference.params import SamplingParams
from edu.model.gpt import GPT, GPTConfig
from edu.synthetic.persona import IdentityQuestion, load_persona
from edu.tasks.gsm8k import GSM8K

# Statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)  # the last two: Newcombe 1998, Statistics in Medicine 17, table I, method 3
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
    assert (interval.value, interval.n) == (successes / n, n)


def test_proportions_of_nothing_are_refused() -> None:
    for successes, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="trials"):
            wilson(successes, n)
    with pytest.raises(ValueError, match="no problems"):
        bootstrap_over_problems([])


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for bad in ({"n": n, "c": n + 1, "k": 1}, {"n": n, "c": c, "k": n + 1}, {"n": n, "c": c, "k": 0}):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(**bad)


def test_the_bootstrap_interval_matches_the_normal_one_and_is_reproducible() -> None:
    values = np.random.default_rng(1).random(400).tolist()
    interval = bootstrap_over_problems(values)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert interval.value == pytest.approx(np.mean(values))
    assert (interval.low, interval.high) == pytest.approx((interval.value - half, interval.value + half), abs=0.004)
    assert interval == bootstrap_over_problems(values) != bootstrap_over_problems(values, seed=1)
    assert bootstrap_over_problems([0.25] * 7).low == bootstrap_over_problems([0.25] * 7).high == 0.25


def test_the_sign_test_gives_binomial_tails() -> None:
    assert [sign_test(0, 0), sign_test(3, 3), sign_test(5, 0)] == [1.0, 1.0, 2 / 32]
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(700, 600) == pytest.approx(0.006, abs=5e-4)  # beyond the range of floats' 2**n


def test_a_paired_comparison_sees_what_unpaired_intervals_hide() -> None:
    first = [0.0, 1.0] * 50
    second = [1.0 if i < 12 else value for i, value in enumerate(first)]
    result = compare(first, second)
    assert (result.better, result.worse, result.ties) == (6, 0, 94)
    assert result.p_value == pytest.approx(2 / 64)
    assert result.difference.value == pytest.approx(0.06)
    assert result.difference.low > 0
    assert wilson(int(sum(first)), 100).high > wilson(int(sum(second)), 100).low
    with pytest.raises(ValueError, match="same problems"):
        compare([1.0], [1.0, 0.0])


# Problems


def said(text: str, tokenizer: Tokenizer, finish_reason: str = "stop") -> Any:
    """The engine's sample of an assistant who says `text`, calculator annotations being tool calls."""
    ids = render(conversation("?", text), tokenizer).ids
    tokens = ids[ids.index(tokenizer.assistant_start) + 1 :]
    return SimpleNamespace(tokens=tokens if finish_reason == "stop" else tokens[:-1], finish_reason=finish_reason)


class Scripted:
    """An engine that gives each prompt the answers written down for it, and remembers what it was asked."""

    def __init__(self, answers: dict[str, list[Any]], tokenizer: Tokenizer) -> None:
        prompts = {question: render_prompt([{"role": "user", "content": question}], tokenizer) for question in answers}
        self.answers = {tuple(prompts[question]): samples for question, samples in answers.items()}
        self.calls: list[dict[str, Any]] = []
        self.config = SimpleNamespace(max_position_embeddings=256)

    def generate(self, prompts: list[list[int]], num_samples: int, params: SamplingParams, **options: Any) -> Any:
        assert len(options["seed"]) == len(prompts)
        self.calls.append(vars(params) | options)
        return [self.answers[tuple(prompt)][:num_samples] for prompt in prompts]


PROBLEMS = [
    {"question": "Six and four?", "answer": "6+4=<<6+4=10>>10\n#### 10", "kind": "+", "steps": 1},
    {"question": "Half of 48?", "answer": "48/2=<<48/2=24>>24\n#### 24", "kind": "/", "steps": 1},
    {"question": "Six, four, half?", "answer": "6+4=<<6+4=10>>10\n10/2=<<10/2=5>>5\n#### 5", "kind": "+/", "steps": 2},
]


@pytest.fixture
def task(tmp_path: Path) -> GSM8K:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return GSM8K("test", path)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Any:
    def answers(*texts: str) -> list[Any]:
        return [said(text, tokenizer) for text in texts]

    cut = said("#### 5", tokenizer, "length")
    script = {
        "Six and four?": answers("6+4=<<6+4=10>>10\n#### 10", "#### 10", "#### 11", "#### 10.0"),
        "Half of 48?": answers("48/2=<<48/2=24>>24\n#### 2", "#### 2", "#### 23", "no"),
        "Six, four, half?": [
            cut,
            *answers("6+4=<<6+4=10>>10\n#### 5", "#### 4"),
            said("1/0=<<1/0=0>>", tokenizer, "tool_error"),
        ],
    }
    return Scripted(script, tokenizer)


def test_greedy_evaluation_counts_right_finished_answers(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    found = evaluate_task(engine, tokenizer, task, max_new_tokens=50, quiet=True)
    assert found.summary["accuracy"] == {"value": 1 / 3, "low": wilson(1, 3).low, "high": wilson(1, 3).high, "n": 3}
    assert {kind: each["value"] for kind, each in found.summary["by_kind"].items()} == {"+": 1.0, "+/": 0.0, "/": 0.0}
    assert {steps: (each["value"], each["n"]) for steps, each in found.summary["by_steps"].items()} == {
        "1": (0.5, 2),
        "2": (0.0, 1),
    }
    assert "by_template" not in found.summary
    answers = found.summary["answers"]
    assert (answers["stopped"], answers["truncated"], answers["used_tool"]) == pytest.approx((2 / 3, 1 / 3, 2 / 3))
    assert answers["right_without_tool"] == 0.0
    (options,) = engine.calls
    assert (options["temperature"], options["max_new_tokens"], options["stop_tokens"]) == (
        0.0,
        50,
        {tokenizer.assistant_end},
    )


def test_sampled_evaluation_gives_unbiased_pass_at_k(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    found = evaluate_task(engine, tokenizer, task, num_samples=4, temperature=1.0, seed=3, quiet=True)
    values = {name: each["value"] for name, each in found.summary.items() if name.startswith("pass@")}
    assert values == pytest.approx({"pass@1": (3 / 4 + 0 + 1 / 4) / 3, "pass@2": (1 + 0 + 1 / 2) / 3, "pass@4": 2 / 3})
    answers = found.summary["answers"]
    assert (answers["tool_error"], answers["right_without_tool"]) == pytest.approx((1 / 12, 2 / 4))
    assert found.records[0]["samples"][0]["with_tools"] == PROBLEMS[0]["answer"]
    assert found.records[0]["samples"][0]["text"] == "6+4=10\n#### 10"
    assert len(set(engine.calls[0]["seed"])) == 3


def test_a_problems_seed_does_not_depend_on_how_many_are_asked(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    for limit in (3, 2, 99):
        evaluate_task(engine, tokenizer, task, num_samples=2, temperature=1.0, seed=3, limit=limit, quiet=True)
    evaluate_task(engine, tokenizer, task, num_samples=2, temperature=1.0, seed=4, quiet=True)
    three, two, all_of_them, other = (call["seed"] for call in engine.calls)
    assert three[:2] == two
    assert three == all_of_them
    assert not set(three) & set(other)


def test_a_problem_may_be_asked_after_other_turns(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    before = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pico."}]
    alone = evaluate_task(engine, tokenizer, task, quiet=True)
    later = [render_prompt([*before, *task.get_example(i)["messages"]], tokenizer) for i in range(3)]
    engine.answers = dict(zip(map(tuple, later), engine.answers.values(), strict=True))  # it knows no other prompt
    assert evaluate_task(engine, tokenizer, task, before=before, quiet=True) == alone


def test_the_third_turn_is_asked_after_the_models_own_first_two_answers(
    tokenizer: Tokenizer, task: GSM8K, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluate(*_: Any, before: Any = (), **__: Any) -> evals.Evaluation:
        asked.append(before)
        return evals.Evaluation({}, [])

    monkeypatch.setattr(evals, "evaluate_task", evaluate)
    who, maker = said("I am Pico.", tokenizer), said("The Tiny Lab.", tokenizer)
    script = Scripted({"Who are you?": [who], "Who made you?": [maker]}, tokenizer)
    measures = suite.Suite(
        {"math": task}, load_persona(Path(__file__).parent.parent / "data" / "persona.yaml"), [], None
    )
    config: Any = SimpleNamespace(
        sample_prompts=("Who are you?", "Who made you?", "Not this."),
        max_new_tokens=8,
        eval_limit=None,
        eval_samples=2,
        seed=0,
        out=tmp_path,
    )
    found = suite.run_suite(script, tokenizer, config, measures)  # type: ignore[arg-type]
    turns = ["Who are you?", "I am Pico.", "Who made you?", "The Tiny Lab."]
    assert [[turn["content"] for turn in before] for before in asked] == [[], turns, []]
    assert list(found["math"]) == ["greedy", "third_turn", "sampled"]


def test_a_problem_beyond_the_context_counts_as_unanswered(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    engine.config.max_position_embeddings = len(render_prompt(task.get_example(2)["messages"], tokenizer))
    found = evaluate_task(engine, tokenizer, task, quiet=True)
    assert [len(record["samples"][0]["tokens"]) > 0 for record in found.records] == [True, True, False]
    assert (found.summary["accuracy"]["n"], found.summary["answers"]["truncated"]) == (3, 1 / 3)


def test_all_wrong_is_not_certainly_zero(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    task.examples = task.examples[1:2]
    found = evaluate_task(engine, tokenizer, task, num_samples=4, temperature=1.0, quiet=True)
    assert found.summary["pass@4"] == vars(wilson(0, 1))


def test_a_template_of_several_parts_counts_for_each(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    for example, template in zip(task.examples, ("start1 gain2", "shares1", "start1 shares1"), strict=True):
        example["template"] = template
    table = evaluate_task(engine, tokenizer, task, quiet=True).summary["by_template"]
    counts = {part: (each["value"], each["n"]) for part, each in table.items()}
    assert counts == {"gain2": (1.0, 1), "shares1": (0.0, 2), "start1": (0.5, 2)}


def test_without_the_calculator_no_tool_answers(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    for calculator in (True, False):
        evaluate_task(engine, tokenizer, task, calculator=calculator, quiet=True)
    assert [call["tool"] is None for call in engine.calls] == [False, True]
    assert [tokenizer.python_end in call["stop_tokens"] for call in engine.calls] == [False, True]


def test_greedy_answers_are_not_sampled_many_times(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        evaluate_task(engine, tokenizer, task, num_samples=2, temperature=0.0, quiet=True)


def test_every_number_can_be_recomputed_from_what_is_saved(
    engine: Any, tokenizer: Tokenizer, task: GSM8K, tmp_path: Path
) -> None:
    sampled = evaluate_task(engine, tokenizer, task, num_samples=4, temperature=1.0, quiet=True)
    greedy = evaluate_task(engine, tokenizer, task, quiet=True)
    save(tmp_path / "out" / "eval.json", {"model": "m"}, {"sampled": sampled, "greedy": greedy})
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    records = read_records(tmp_path / "out" / "eval.json")
    assert written["model"] == "m"
    assert {name: summarise_task(records[name]) for name in records} == written["results"]
    for name, evaluation in (("sampled", sampled), ("greedy", greedy)):
        for record in evaluation.records:
            rewards = [
                task.reward(record, each["text"]) * (each["finish_reason"] == "stop") for each in record["samples"]
            ]
            assert rewards == [each["reward"] for each in record["samples"]], name


def test_two_checkpoints_are_compared_problem_by_problem(engine: Any, tokenizer: Tokenizer, task: GSM8K) -> None:
    sampled = evaluate_task(engine, tokenizer, task, num_samples=4, temperature=1.0, quiet=True).records
    greedy = evaluate_task(engine, tokenizer, task, quiet=True).records
    result = compare_records(sampled, greedy)
    assert (result.better, result.worse, result.ties) == (1, 1, 1)
    assert result.difference.value == pytest.approx((1 / 4 + 0 - 1 / 4) / 3)
    with pytest.raises(ValueError, match="not of the same problems"):
        compare_records(sampled[:2], greedy[1:])


def test_an_untrained_model_is_measured_end_to_end(tokenizer: Tokenizer, task: GSM8K) -> None:
    torch.manual_seed(0)
    config = GPTConfig.tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    engine = Engine(GPT(config).eval())
    found = evaluate_task(engine, tokenizer, task, num_samples=2, temperature=1.0, max_new_tokens=8, quiet=True)
    again = evaluate_task(engine, tokenizer, task, num_samples=2, temperature=1.0, max_new_tokens=8, quiet=True)
    assert found == again
    assert found.summary["pass@1"]["value"] == 0.0
    assert found.summary["answers"]["truncated"] > 0


# Persona and facts


def test_persona_is_graded_on_three_counts_and_only_when_finished(tokenizer: Tokenizer) -> None:
    persona = load_persona(Path(__file__).parent.parent / "data" / "persona.yaml")
    good = f"My name is {persona.name}."
    script = {
        "a?": [said(good, tokenizer)],
        "b?": [said(f"I am {persona.name}, a tiny chat12/12/7", tokenizer)],
        "c?": [said(good, tokenizer, "length")],
        "d?": [said("The sky is blue.", tokenizer)],
    }
    questions = [IdentityQuestion(question, "name") for question in script]
    found = evaluate_persona(Scripted(script, tokenizer), tokenizer, questions, persona, quiet=True)  # type: ignore[arg-type]
    values = {name: each["value"] for name, each in found.summary.items()}
    assert values == {"names_itself": 0.5, "well_formed": 0.25, "right_intent": 0.25, "all_three": 0.25}
    assert summarise_persona(json.loads(json.dumps(found.records))) == found.summary


def test_facts_are_right_when_the_answer_stands_in_them_as_a_word(tokenizer: Tokenizer, tmp_path: Path) -> None:
    script = {
        "a?": [said("The sky is Blue.", tokenizer)],
        "b?": [said("A bluebird.", tokenizer)],
        "c?": [said("It is blue.", tokenizer, "length")],
        "d?": [said("red", tokenizer)],
    }
    path = tmp_path / "chats_test.jsonl"
    rows = [{"messages": [{"role": "user", "content": question}], "answer": "blue"} for question in script]
    rows[0]["messages"] = [*rows[0]["messages"], {"role": "assistant", "content": "Blue."}]  # type: ignore[misc]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = evaluate_facts(Scripted(script, tokenizer), tokenizer, path, quiet=True)  # type: ignore[arg-type]
    assert [record["right"] for record in found.records] == [True, False, False, False]
    assert found.summary == summarise_facts(found.records) == {"accuracy": vars(wilson(1, 4))}
    path.write_text('{"messages": [{"role": "user", "content": "a?"}], "answer": "x"}\n{"answer": "blue"}')
    with pytest.raises(ValueError, match=r"chats_test\.jsonl, row 2: an empty conversation"):
        evaluate_facts(Scripted(script, tokenizer), tokenizer, path, quiet=True)  # type: ignore[arg-type]


# Bits per byte


class Fixed(nn.Module):
    """Gives every target the log-probability that a table holds for it."""

    def __init__(self, logprobs: Sequence[float]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logprobs))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        assert inputs.shape == position_ids.shape
        return torch.where(targets >= 0, self.table[targets.clamp(min=0)], 0.0)


def rows(*documents: list[int], length: int = 8) -> Batch:
    return collate([[TrainingExample(ids, [1] * len(ids))] for ids in documents], length)


def test_bits_per_byte_divides_the_bits_of_text_by_its_raw_bytes() -> None:
    # token: 0 has 2 bytes, 1 has 1 byte, 2 is special; -1 (the rest of each row) counts nowhere
    batches = [rows([2, 0, 1, 2]), rows([2, 1, 1], [2, 0])]
    model = Fixed([math.log(1 / 8), math.log(1 / 2), math.log(1 / 100)])
    table = np.array([2, 1, 0])
    bits, n_bytes = (3 + 1) + (1 + 1 + 3), (2 + 1) + (1 + 1 + 2)
    assert bits_per_byte(model, batches, table) == pytest.approx(bits / n_bytes)
    assert [n for _, n in text_nats(model, batches, table)] == [3, 4]
    found = evaluate_text(model, batches, table)
    assert found.summary["bits_per_byte"] == pytest.approx(bits / n_bytes)
    assert sum(record["nats"] for record in found.records) == pytest.approx(bits * math.log(2))
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, [], table)


def test_bytes_are_those_of_the_text_even_where_tokens_cut_characters(tokenizer: Tokenizer) -> None:
    text = "Straße 你好 🙂 12 + 30"
    batch = rows([tokenizer.bos, *tokenizer.encode(text), tokenizer.bos], length=100)
    model = Fixed([-1.0] * tokenizer.vocab_size)
    ((_, n_bytes),) = text_nats(model, [batch], tokenizer.token_bytes())
    assert n_bytes == len(text.encode())


def markov(seed: int, chain: Callable[[int, np.random.Generator], int], count: int = 4000) -> list[Batch]:
    rng, ids = np.random.default_rng(seed), [0]
    for _ in range(count):
        ids.append(chain(ids[-1], rng))
    return [rows(ids, length=count)]


def test_ngrams_reach_the_entropy_of_the_source_they_can_express() -> None:
    def chain(last: int, rng: np.random.Generator) -> int:
        return int((last + 1) % 4 if rng.random() < 0.9 else rng.integers(4))

    table = np.ones(4, dtype=np.int64)
    found = ngram_bits_per_byte(markov(0, chain), markov(1, chain), table, 4)
    p = [0.925, 0.025, 0.025, 0.025]
    entropy = -sum(x * math.log2(x) for x in p)
    assert found["unigram"] == pytest.approx(2.0, abs=0.01)
    assert found["bigram"] == pytest.approx(entropy, abs=0.06)


def test_the_bigram_backs_off_where_pairs_say_nothing() -> None:
    def independent(_: int, rng: np.random.Generator) -> int:
        return min(int(rng.geometric(0.05)), 199)

    table = np.ones(200, dtype=np.int64)
    found = ngram_bits_per_byte(markov(0, independent), markov(1, independent), table, 200)
    assert found["bigram_prior"] >= 1000
    assert found["bigram"] == pytest.approx(found["unigram"], abs=0.03)
    unseen = ngram_bits_per_byte([rows([0, 1, 0, 1])], [rows([2, 3, 3, 2])], table, 200)
    assert all(math.isfinite(value) for value in unseen.values())
