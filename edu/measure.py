"""What is measured of every chat model at the end of its stage, and the validation loss on the way."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from edu import evals
from edu.chat import stream_text
from edu.config import ChatConfig
from edu.engine import Engine
from edu.evals import Evaluation
from edu.metrics import measures
from edu.model import GPT
from edu.packing import IGNORE, Batch
from edu.persona import load_identity_eval, load_persona
from edu.tasks.gsm8k import GSM8K
from edu.tokenizer import Tokenizer

Shown = dict[str, object]


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """Mean of -log p over all targets of the batches, nats."""
    total, count = 0.0, 0
    for batch in (b.to(model.device) for b in batches):
        total -= float(model(batch.inputs, targets=batch.targets, position_ids=batch.positions).sum())
        count += int((batch.targets != IGNORE).sum())
    return total / max(count, 1)


def show_answers(engine: Engine, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int) -> list[Shown]:
    """Greedy answers to questions, calls of tools included, as lines of samples.jsonl."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    groups = evals.ask(engine, tokenizer, chats, evals.Sampling(max_new_tokens=max_new_tokens), "samples", quiet=True)
    texts = ["".join(stream_text(sample.tokens, tokenizer, show_tools=True)) for (sample,) in groups]
    return [{"prompt": question, "completion": text} for question, text in zip(questions, texts, strict=True)]


def show_continuations(engine: Engine, tokenizer: Tokenizer, beginnings: Sequence[str], count: int) -> list[Shown]:
    """Greedy continuations of texts, up to the document's end, as lines of samples.jsonl."""
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in beginnings]
    groups = engine.generate(prompts, max_new_tokens=count, temperature=0, stop_tokens=[tokenizer.bos])
    texts = [tokenizer.decode(sample.tokens, skip_special=True) for (sample,) in groups]
    return [{"prompt": text, "completion": more} for text, more in zip(beginnings, texts, strict=True)]


def measure_chat(engine: Engine, tokenizer: Tokenizer, config: ChatConfig) -> dict[str, Any]:
    """Math on held-out problems (greedy, and sampled at temperature 1), persona, facts: the summaries.

    The records behind them go to eval.jsonl in the stage's folder.
    """
    found: dict[str, Evaluation] = {}
    quiet = not sys.stderr.isatty()
    greedy = {"max_new_tokens": config.max_new_tokens, "limit": config.eval_limit, "quiet": quiet}
    sampled = greedy | {"num_samples": config.eval_samples, "temperature": 1.0, "seed": config.seed}
    splits = {"math": "test", "math_templates": "test_templates"}
    for name, split in splits.items():
        if split == "test" or (config.problems and (config.problems / f"{split}.jsonl").is_file()):
            task = GSM8K(split, config.problems)
            found[f"{name}/greedy"] = evals.evaluate_task(engine, tokenizer, task, **greedy)
            found[f"{name}/sampled"] = evals.evaluate_task(engine, tokenizer, task, **sampled)
    if config.identity is not None:
        persona = load_persona(config.persona)
        questions = load_identity_eval(config.identity, persona)
        found["persona"] = evals.evaluate_persona(engine, tokenizer, questions, persona, quiet=quiet)
    if config.facts is not None:
        found["facts"] = evals.evaluate_facts(engine, tokenizer, config.facts, quiet=quiet)
    evals.save_records(config.out / "eval.jsonl", found)
    summary: dict[str, Any] = {}
    for name, evaluation in found.items():
        figures = [f"{path[0]} {figure}" for path, figure in measures(evaluation.summary) if path[1:] == ()]
        print(f"{name}: " + "; ".join(figures))
        first, _, second = name.partition("/")
        shown = {key: value for key, value in evaluation.summary.items() if key != "by_template"}  # long: recompute it
        summary.setdefault(first, {}).update({second: shown} if second else shown)
    return summary
