"""Evaluation of a chat model: problems solved, persona kept, facts known.

Every result is an `Evaluation`: records, one per problem, question or batch, and a summary computed from the records alone.
Saved as `x.json` (summaries) and `x.jsonl` (records), so that any number can be checked, recomputed, or compared in pairs.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from edu.chat.chat_format import Message, calculator_tool, check_messages, render_prompt, stream_text
from edu.config.terminal import progress
from edu.data.rows import read_rows, text_field
from edu.data.tokenizer import Tokenizer
from edu.evaluation.statistics import bootstrap_over_problems, pass_at_k, wilson
from edu.inference.params import Sample, SamplingParams
from edu.synthetic.persona import IdentityQuestion, Persona, grade
from edu.tasks.score import completion_text, score
from edu.tasks.task import Task

if TYPE_CHECKING:
    from edu.inference.engine import Engine

Record = dict[str, Any]
Chat = Sequence[Message]
GROUPINGS = ("source", "kind", "template", "steps")  # fields of an example that a table is made by, where it has them
CHUNK = 64  # prompts given to the engine between two updates of the progress bar; no result depends on it


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation."""

    summary: dict[str, Any]
    """A tree of numbers; an interval is {"value", "low", "high", "n"}"""
    records: list[Record]
    """One entry per problem, question or batch, from which the summary is computed."""


def ask(
    engine: "Engine",
    tokenizer: Tokenizer,
    chats: Sequence[Chat],
    params: SamplingParams,
    label: str,
    quiet: bool,
    *,
    num_samples: int = 1,
    seed: int = 0,
    calculator: bool = True,
) -> Iterator[list[Sample]]:
    """Let the model answer conversations, calculator at hand or not; the samples of each, in order.

    Conversation i has its own seed, made of the seed and i: what it gets does not depend on how many others are asked.
    One that does not fit into the model's context stays unanswered: samples without a token, truncated.
    Without the calculator an answer ends where stock transformers ends it, at a call too, since nobody answers that.
    """
    if params.temperature == 0 and num_samples > 1:
        raise ValueError(f"--temperature 0 with --num-samples {num_samples}: greedy answers are all the same")
    stops = [tokenizer.assistant_end, *([] if calculator else [tokenizer.python_end, tokenizer.bos])]
    params = replace(params, stop_tokens=stops)
    prompts = [render_prompt(messages, tokenizer) for messages in chats]
    seeds = [int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in range(len(prompts))]
    with progress(len(prompts), label, quiet=quiet) as bar:
        for start in range(0, len(prompts), CHUNK):
            chunk = range(start, min(start + CHUNK, len(prompts)))
            fitting = [i for i in chunk if len(prompts[i]) < engine.config.max_position_embeddings]
            groups = engine.generate(
                [prompts[i] for i in fitting],
                num_samples,
                params,
                seed=[seeds[i] for i in fitting],
                tool=calculator_tool(tokenizer) if calculator else None,
            )
            bar.advance(len(chunk), tokens=sum(len(sample.tokens) for group in groups for sample in group))
            found = dict(zip(fitting, groups, strict=True))
            yield from (found.get(i) or [Sample() for _ in range(num_samples)] for i in chunk)


def _sample_record(sample: Sample, tokenizer: Tokenizer) -> Record:
    """Return a sample as JSON: `text` is what is graded, `with_tools` shows the calculator's work as well."""
    return {
        "text": completion_text(sample.tokens, tokenizer),
        "with_tools": "".join(stream_text(sample.tokens, tokenizer, show_tools=True)),
        "tool_calls": sample.tokens.count(tokenizer.output_start),
        "finish_reason": sample.finish_reason,
        "tokens": list(sample.tokens),
    }


def evaluate_task(
    engine: "Engine",
    tokenizer: Tokenizer,
    task: Task,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 96,
    seed: int = 0,
    limit: int | None = None,
    before: Chat = (),
    calculator: bool = True,
    quiet: bool = False,
) -> Evaluation:
    """Let the model solve the task's first `limit` problems, each as the next turn after `before`: greedily, or with num_samples each."""
    examples = [task.get_example(i) for i in range(len(task) if limit is None else min(limit, len(task)))]
    params = SamplingParams(max_new_tokens, temperature)
    drawn = {"num_samples": num_samples, "seed": seed, "calculator": calculator}
    chats = [[*before, *example["messages"]] for example in examples]
    groups = ask(engine, tokenizer, chats, params, "problems", quiet, **drawn)
    records: list[Record] = []
    for index, (example, group) in enumerate(zip(examples, groups, strict=True)):
        record = {"index": index, "prompt": example["messages"][-1]["content"], "answer": example["answer"]}
        record |= {name: example[name] for name in GROUPINGS if name in example} | {"greedy": temperature == 0}
        rewards = [score(sample, example, task, tokenizer) for sample in group]
        record["samples"] = [
            {**_sample_record(s, tokenizer), "reward": reward} for s, reward in zip(group, rewards, strict=True)
        ]
        records.append(record)
    return Evaluation(summarise_task(records), records)


def _rewards(record: Record) -> list[float]:
    return [sample["reward"] for sample in record["samples"]]


def summarise_task(records: Sequence[Record]) -> dict[str, Any]:
    """Return accuracy with Wilson's interval (greedy), or pass@k with bootstrap intervals; tables by kind; how answers ended.

    pass@k takes a reward of 1.0 as right; k doubles up to the number of samples. A template made of several parts, as
    "groups1 loss4", counts for each of its parts.
    """
    if not records:
        raise ValueError("an evaluation needs at least one problem")
    greedy, num_samples = records[0]["greedy"], len(records[0]["samples"])
    right = [sum(reward == 1.0 for reward in _rewards(record)) for record in records]

    def rate(chosen: Sequence[int], k: int = 1) -> dict[str, Any]:
        if greedy:
            return asdict(wilson(sum(right[i] for i in chosen), len(chosen)))
        values = [pass_at_k(num_samples, right[i], k) for i in chosen]
        if sum(values) in (
            0,
            len(values),
        ):  # resampling sees no spread where there is none: the honest width is Wilson's
            return asdict(wilson(round(sum(values)), len(values)))
        return asdict(bootstrap_over_problems(values))

    everything = range(len(records))
    ks = [1 << i for i in range(num_samples.bit_length())]
    summary = {"accuracy": rate(everything)} if greedy else {f"pass@{k}": rate(everything, k) for k in ks}
    for name in GROUPINGS:
        members: dict[str, list[int]] = {}
        for i in everything:
            value = str(records[i].get(name, ""))
            for group in value.split() if name == "template" else [value] if value else []:
                members.setdefault(group, []).append(i)
        if members:
            summary[f"by_{name}"] = {group: rate(members[group]) for group in sorted(members)}
    return summary | {"answers": _behaviour([sample for record in records for sample in record["samples"]])}


def _behaviour(samples: Sequence[Record]) -> dict[str, float]:
    """Summarize how answers end, how long they are and whether the calculator was used, as shares of samples; length in tokens."""

    def share(test: Callable[[Record], bool], of: Sequence[Record] = samples) -> float:
        return fmean(test(sample) for sample in of) if of else 0.0

    return {
        "stopped": share(lambda s: s["finish_reason"] == "stop"),
        "truncated": share(lambda s: s["finish_reason"] == "length"),
        "tool_error": share(lambda s: s["finish_reason"] == "tool_error"),
        "empty": share(lambda s: not s["text"].strip()),
        "used_tool": share(lambda s: s["tool_calls"] > 0),
        "right_without_tool": share(lambda s: s["tool_calls"] == 0, [s for s in samples if s["reward"] == 1.0]),
        "mean_length": fmean(len(sample["tokens"]) for sample in samples),
    }


def evaluate_persona(
    engine: "Engine",
    tokenizer: Tokenizer,
    questions: Sequence[IdentityQuestion],
    persona: Persona,
    *,
    max_new_tokens: int = 64,
    quiet: bool = False,
) -> Evaluation:
    """Grade greedy answers to held-out identity questions, each graded on three counts; an unfinished answer fails them all."""
    chats = [[{"role": "user", "content": question.question}] for question in questions]
    records = _greedy(engine, tokenizer, chats, SamplingParams(max_new_tokens, 0), "persona", quiet)
    for question, record in zip(questions, records, strict=True):
        finished = record["finish_reason"] == "stop"
        grades = asdict(grade(record["text"], question.intent, persona))
        record.update(intent=question.intent, **{name: finished and given for name, given in grades.items()})
    return Evaluation(summarise_persona(records), records)


def summarise_persona(records: Sequence[Record]) -> dict[str, Any]:
    """Return the shares of answers that pass each count, and all three, with Wilson's intervals."""
    counts = ("names_itself", "well_formed", "right_intent")
    summary = {name: asdict(wilson(sum(r[name] for r in records), len(records))) for name in counts}
    return summary | {"all_three": asdict(wilson(sum(all(r[name] for name in counts) for r in records), len(records)))}


def evaluate_facts(
    engine: "Engine",
    tokenizer: Tokenizer,
    path: Path,
    *,
    max_new_tokens: int = 64,
    limit: int | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Grade greedy answers to the questions of a file of {"messages", "answer"}: right if finished and the answer occurs as words."""
    chats, answers = list[Chat](), list[str]()
    for place, row in islice(read_rows(path), limit):
        answers.append(text_field(row, "answer", place))
        try:
            messages = check_messages(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        chats.append(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    records = _greedy(engine, tokenizer, chats, SamplingParams(max_new_tokens, 0), "facts", quiet)
    for record, answer in zip(records, answers, strict=True):
        found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", record["text"], re.IGNORECASE)
        record.update(answer=answer, right=record["finish_reason"] == "stop" and found is not None)
    return Evaluation(summarise_facts(records), records)


def summarise_facts(records: Sequence[Record]) -> dict[str, Any]:
    """Return the share of right answers, with Wilson's interval."""
    return {"accuracy": asdict(wilson(sum(record["right"] for record in records), len(records)))}


def _greedy(
    engine: "Engine", tokenizer: Tokenizer, chats: Sequence[Chat], params: SamplingParams, label: str, quiet: bool
) -> list[Record]:
    """Return one greedy answer to each conversation, as a record."""
    groups = ask(engine, tokenizer, chats, params, label, quiet)
    return [
        {"index": i, "prompt": chat[-1]["content"], **_sample_record(sample, tokenizer)}
        for i, (chat, (sample,)) in enumerate(zip(chats, groups, strict=True))
    ]


def save_records(path: Path, evaluations: dict[str, Evaluation]) -> None:
    """Write the records of all evaluations, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name, evaluation in evaluations.items():
            file.writelines(
                json.dumps({"task": name, **record}, ensure_ascii=False) + "\n" for record in evaluation.records
            )
