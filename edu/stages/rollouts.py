"""Rollouts: sample K answers to a problem, score each, and turn what was sampled into rows to learn from.

A rollout trains exactly the tokens that the model chose (the stop token too, if it was reached). The prompt and tool
outputs are only read. It is sampled at temperature 1 from the full softmax, so the log-probabilities trained are those sampled from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from edu.chat.chat_format import calculator_tool, render_prompt, stream_text
from edu.config import metrics
from edu.data.packing import Batch, TrainingExample, collate, pack_rows
from edu.data.tokenizer import Tokenizer
from edu.inference.engine import Engine
from edu.inference.params import Sample, SamplingParams
from edu.model.gpt import GPT
from edu.stages.objective import Advantage, advantages
from edu.tasks.score import Grader, Score, score_all
from edu.tasks.task import Example, Subset, Task


@dataclass(frozen=True)
class Rollout:
    """One answer to one problem."""

    prompt: list[int]
    sample: Sample
    reward: float
    advantage: float
    """Excess of the reward over its group's, as edu.stages.objective defines."""
    logged: Score | None = None
    """Columns and metrics that the reward function logged."""

    @property
    def length(self) -> int:
        """Sampled tokens, those that count."""
        return sum(self.sample.mask)

    @property
    def piece(self) -> TrainingExample:
        """Training example: the sampled tokens, weighted by the advantage."""
        mask = [0] * len(self.prompt) + self.sample.mask
        return TrainingExample(self.prompt + self.sample.tokens, mask, self.advantage)


def filter_by_length(task: Task, tokenizer: Tokenizer, room: int) -> tuple[Task, int]:
    """Return the problems whose prompt has at most `room` tokens, and how many do not; ValueError if none is left."""
    lengths = [len(render_prompt(task.get_example(i)["messages"], tokenizer)) for i in range(len(task))]
    kept = [i for i, length in enumerate(lengths) if length <= room]
    if not kept:
        raise ValueError(
            f"no problem leaves room for an answer: the shortest has {min(lengths)} tokens, {room} are free"
        )
    return Subset(task, kept), len(lengths) - len(kept)


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    grader: Grader,
    examples: Sequence[Example],
    seeds: Sequence[int],
    *,
    num_samples: int,
    max_new_tokens: int,
    advantage: Advantage = "mean",
) -> list[list[Rollout]]:
    """Sample K independent rollouts of each problem, score all by one call of the grader, and compare each group."""
    prompts = [render_prompt(example["messages"], tokenizer) for example in examples]
    groups = engine.generate(
        prompts,
        num_samples,
        SamplingParams(max_new_tokens, stop_tokens=[tokenizer.assistant_end]),
        seed=seeds,
        tool=calculator_tool(tokenizer),
    )
    samples = [sample for group in groups for sample in group]
    scores = iter(score_all(samples, [e for e in examples for _ in range(num_samples)], grader, tokenizer))
    rollouts = []
    for prompt, group in zip(prompts, groups, strict=True):
        found = [next(scores) for _ in group]
        rated = zip(group, found, advantages([score.reward for score in found], advantage), strict=True)
        rollouts.append([Rollout(prompt, sample, score.reward, above, score) for sample, score, above in rated])
    return rollouts


def joined(pieces: Sequence[TrainingExample]) -> TrainingExample:
    """Join answers to one prompt into one example, so that the prompt is computed once.

    Each further answer is a branch: it repeats the prompt's last token, which predicts its first own one, at that token's
    position. Attention, and so every log-probability, is that of the answer alone (`edu.model.masks.document_mask`).

    >>> both = joined([TrainingExample([5, 6, 7], [0, 0, 1]), TrainingExample([5, 6, 8, 9], [0, 0, 1, 1])])
    >>> both.ids.tolist(), both.mask.tolist(), both.positions.tolist()
    ([5, 6, 7, 6, 8, 9], [0, 0, 1, 0, 1, 1], [0, 1, 2, 1, 2, 3])
    """
    starts = [0] + [_prompt(pieces[0]) - 1] * (len(pieces) - 1)
    fields = [(p.ids, p.mask, np.broadcast_to(p.weight, len(p.ids)), np.arange(len(p.ids))) for p in pieces]
    kept = [[np.asarray(each)[start:] for each in parts] for start, parts in zip(starts, fields, strict=True)]
    return TrainingExample(*map(np.concatenate, zip(*kept, strict=True)))


def _prompt(piece: TrainingExample) -> int:
    """Count the tokens before the first target."""
    return int(np.argmax(piece.mask))


Part = list[list[list[int]]]
"""Micro-batch: rows of bundles of indices. A bundle is the answers joined behind one prompt."""


def lay_out(pieces: Sequence[TrainingExample], sequence_length: int, batch_size: int) -> list[Part]:
    """Lay out answers in micro-batches of rows: neighbors with the same prompt are joined, as many as fit a row, split evenly.

    >>> lay_out([TrainingExample([7] * 4 + [i], [0, 0, 0, 0, 1]) for i in range(3)], sequence_length=6, batch_size=4)
    [[[[0, 2]], [[1]]]]
    """

    def tokens(share: list[int]) -> int:
        """Count the tokens of the branches."""
        return sum(len(pieces[i].ids) + 1 - _prompt(pieces[i]) for i in share)

    bundles = list[list[int]]()
    # Joined length: prompt - 1 + sum(1 + own tokens); a row takes T + 1. Add shares until the largest fits; each answer,
    # longest first, goes to the shortest share.
    for _, group in groupby(range(len(pieces)), key=lambda i: list(pieces[i].ids[: _prompt(pieces[i])])):
        members = sorted(group, key=lambda i: -len(pieces[i].ids))
        room, shares = sequence_length + 2 - _prompt(pieces[members[0]]), [members]
        while max(map(tokens, shares)) > room and len(shares) < len(members):
            shares = [list[int]() for _ in range(len(shares) + 1)]
            for i in members:
                min(shares, key=tokens).append(i)
        bundles += shares
    rows = pack_rows([joined([pieces[i] for i in bundle]) for bundle in bundles], sequence_length)
    return [[[bundles[i] for i in row] for row in rows[at : at + batch_size]] for at in range(0, len(rows), batch_size)]


def assemble(part: Part, pieces: Sequence[TrainingExample], pad: int = 0) -> Batch:
    """Lay out a micro-batch as long as its longest row, rounded up to 16 tokens: few shapes are few compiled programs."""
    rows = [[joined([pieces[i] for i in bundle]) for bundle in row] for row in part] or [[]]
    longest = max(1, *(sum(len(piece.ids) - 1 for piece in row) for row in rows))
    return collate(rows, -(-longest // 16) * 16, pad)


@torch.no_grad()
def token_logprobs(
    model: GPT, pieces: Sequence[TrainingExample], sequence_length: int, batch_size: int
) -> list[np.ndarray]:
    """Return the log-probability under a model of each of the pieces' tokens, as long as their ids; 0.0 where none is trained.

    The rows are laid out as in training, so what is trained next has these very log-probabilities.
    """
    found = [np.zeros(len(piece.ids)) for piece in pieces]
    for part in lay_out(pieces, sequence_length, batch_size):
        batch = assemble(part, pieces).to(model.device)
        logprobs = model(batch.inputs, targets=batch.targets, position_ids=batch.positions).cpu().double().numpy()
        for line, row in zip(logprobs, part, strict=True):
            at = 0
            for bundle in row:
                at += (prompt := _prompt(pieces[bundle[0]])) - 1
                for i in bundle:
                    own = len(pieces[i].ids) - prompt
                    found[i][prompt:] = line[at : at + own]
                    at += own + 1
                at -= 1
    return found


def show_group(group: Sequence[Rollout], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return a group as lines of samples.jsonl: what was said, calls of tools included, and what it earned."""
    return [
        {
            "prompt": tokenizer.decode(each.prompt, skip_special=True),
            "rollout": "".join(stream_text(each.sample.tokens, tokenizer, show_tools=True)),
            "finish_reason": each.sample.finish_reason,
            "reward": each.reward,
            "advantage": each.advantage,
            **(each.logged.columns if each.logged else {}),
        }
        for each in group
    ]


def summarize(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Return the metrics of a step's rollouts, under TRL's names."""
    flat = [rollout for group in groups for rollout in group]
    rewards = [[rollout.reward for rollout in group] for group in groups]
    logged = dict[str, list[float]]()
    for name, value in (item for rollout in flat if rollout.logged for item in rollout.logged.metrics.items()):
        logged.setdefault(name, []).append(value)
    chosen = [p for r in flat for p, m in zip(r.sample.logprobs, r.sample.mask, strict=True) if m]
    return {
        metrics.REWARD: fmean(rollout.reward for rollout in flat),
        metrics.REWARD_STD: stdev(rollout.reward for rollout in flat),
        metrics.ZERO_STD: fmean(min(group) == max(group) for group in rewards),
        metrics.MEAN_LENGTH: fmean(len(rollout.sample.tokens) for rollout in flat),
        metrics.CLIPPED_RATIO: fmean(rollout.sample.finish_reason == "length" for rollout in flat),
        # -log p of what was sampled is an unbiased estimate of the entropy where it was sampled.
        metrics.ENTROPY: -fmean(chosen),
        **{f"reward/{name}": fmean(values) for name, values in logged.items()},
    }


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, independent of those of all other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of 0 .. count - 1 in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def draw(count: int, seed: int, first: int, number: int) -> list[int]:
    """Entries first .. first + number - 1 of the endless sequence of shuffled epochs, so that a step alone says its own.

    >>> draw(4, 0, 0, 8) == shuffled(4, 0, 0) + shuffled(4, 0, 1)
    True
    """
    epochs = {epoch: shuffled(count, seed, epoch) for epoch in range(first // count, (first + number - 1) // count + 1)}
    return [epochs[i // count][i % count] for i in range(first, first + number)]
