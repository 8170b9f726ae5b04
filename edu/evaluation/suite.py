"""Evaluation suite of every chat model, run at the end of its stage."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edu.chat.chat_format import stream_text
from edu.config.stages import ChatConfig
from edu.data.tokenizer import Tokenizer
from edu.evaluation import evals
from edu.evaluation.estimates import estimates
from edu.evaluation.evals import Evaluation
from edu.inference.engine import Engine
from edu.inference.params import SamplingParams
from edu.synthetic.persona import IdentityQuestion, Persona, load_identity_eval, load_persona
from edu.tasks.gsm8k import GSM8K
from edu.tasks.load import load_task
from edu.tasks.task import Task

Shown = dict[str, object]


def show_answers(engine: Engine, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int) -> list[Shown]:
    """Return greedy answers to questions, calls of tools included, as lines of samples.jsonl."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    groups = evals.ask(engine, tokenizer, chats, SamplingParams(max_new_tokens, 0), "samples", quiet=True)
    texts = ["".join(stream_text(sample.tokens, tokenizer, show_tools=True)) for (sample,) in groups]
    return [{"prompt": question, "completion": text} for question, text in zip(questions, texts, strict=True)]


def show_continuations(engine: Engine, tokenizer: Tokenizer, beginnings: Sequence[str], count: int) -> list[Shown]:
    """Return greedy continuations of texts, up to the document's end, as lines of samples.jsonl."""
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in beginnings]
    groups = engine.generate(prompts, params=SamplingParams(count, 0, stop_tokens=[tokenizer.bos]))
    texts = [tokenizer.decode(sample.tokens, skip_special=True) for (sample,) in groups]
    return [{"prompt": text, "completion": more} for text, more in zip(beginnings, texts, strict=True)]


@dataclass(frozen=True)
class Suite:
    """Held-out data of a chat stage, read before it trains, so that a wrong file costs nothing."""

    tasks: dict[str, Task]
    """Held-out problems by name: math, and math_templates where the problems have such a split; or the user's own."""
    persona: Persona
    questions: list[IdentityQuestion]
    facts: Path | None


def read_task(config: ChatConfig, split: str) -> Task:
    """Return the problems of a split, "train" or "test": the user's own task, or else those in GSM8K's form."""
    return GSM8K(split, config.problems) if config.task is None else load_task(config.task, split)


def load_suite(config: ChatConfig) -> Suite:
    """Read all that the end of the stage needs; ValueError or OSError names what is missing."""
    name = "math" if config.task is None else config.task.rpartition(":")[2]
    tasks = {name: read_task(config, "test")}
    if config.task is None and config.problems is not None and (config.problems / "test_templates.jsonl").is_file():
        tasks["math_templates"] = GSM8K("test_templates", config.problems)
    persona = load_persona(config.persona)
    questions = [] if config.identity is None else load_identity_eval(config.identity, persona)
    if config.facts is not None and not config.facts.is_file():
        raise ValueError(f"--facts {config.facts}: no such file; give --facts None to leave these questions out")
    return Suite(tasks, persona, questions, config.facts)


def run_suite(engine: Engine, tokenizer: Tokenizer, config: ChatConfig, suite: Suite) -> dict[str, Any]:
    """Evaluate math on held-out problems (greedy, also as a chat's later turn, and sampled at temperature 1), persona and facts; return the summaries.

    The records behind them go to eval.jsonl in the stage's folder.
    """
    found: dict[str, Evaluation] = {}
    quiet = not sys.stderr.isatty()
    greedy = {"max_new_tokens": config.max_new_tokens, "limit": config.eval_limit, "quiet": quiet}
    sampled = greedy | {"num_samples": config.eval_samples, "temperature": 1.0, "seed": config.seed}
    before = list[dict[str, object]]()
    for turn in show_answers(engine, tokenizer, config.sample_prompts[:2], config.max_new_tokens):
        before += [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": turn["completion"]}]
    for name, task in suite.tasks.items():
        found[f"{name}/greedy"] = evals.evaluate_task(engine, tokenizer, task, **greedy)
        found[f"{name}/third_turn"] = evals.evaluate_task(engine, tokenizer, task, before=before, **greedy)
        found[f"{name}/sampled"] = evals.evaluate_task(engine, tokenizer, task, **sampled)
    if suite.questions:
        asked = suite.questions
        found["persona"] = evals.evaluate_persona(engine, tokenizer, asked, suite.persona, quiet=quiet)
    if suite.facts is not None:
        found["facts"] = evals.evaluate_facts(engine, tokenizer, suite.facts, quiet=quiet)
    evals.save_records(config.out / "eval.jsonl", found)
    summary: dict[str, Any] = {}
    for name, evaluation in found.items():
        figures = [f"{path[0]} {figure}" for path, figure in estimates(evaluation.summary) if path[1:] == ()]
        print(f"{name}: " + "; ".join(figures))
        first, _, second = name.partition("/")
        shown = {key: value for key, value in evaluation.summary.items() if key != "by_template"}  # long: recompute it
        summary.setdefault(first, {}).update({second: shown} if second else shown)
    return summary
