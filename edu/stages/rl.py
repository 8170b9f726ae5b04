"""Reinforcement learning: sample answers, reward the right ones, make the better ones of each group more likely.

On-policy and without tricks unless told otherwise: one update on what was just sampled (REINFORCE with a group baseline),
normalized by all sampled tokens of the step. Each choice of the literature is one flag; docs/rl.md has the formulas.

Loss of an update: sum(A * -log p) / N over the sampled tokens. A, the advantage, is a constant: the gradient is A * -grad
log p, so an answer better than its group becomes more likely, a worse one less. Nothing else differs from SFT: A is
Batch.weights, and edu.training.step has the minus.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from edu.chat.mixture import load_sft_data
from edu.chat.sft_data import Epochs, batches_of
from edu.config import metrics
from edu.config.rl import RLConfig
from edu.data.tokenizer import Tokenizer
from edu.evaluation.evals import evaluate_task
from edu.evaluation.suite import load_suite, read_task, show_answers
from edu.inference.engine import Engine
from edu.model.gpt import GPT
from edu.model.load import load_model, load_tokenizer
from edu.stages.objective import length_weight, normalizer, surrogate
from edu.stages.rollouts import (
    Rollout,
    assemble,
    draw,
    filter_by_length,
    lay_out,
    roll_out,
    seed_of,
    show_group,
    shuffled,
    summarize,
    token_logprobs,
)
from edu.tasks.load import load
from edu.tasks.score import grade_one_by_one
from edu.tasks.task import Subset, Task
from edu.tasks.trl import TRLGrader
from edu.training.accelerator import compute_init
from edu.training.loop import Hooks, Result, Training, Update, generating, split_rows
from edu.training.run import Run
from edu.training.step import Term

FIRST_STEPS = 3
"""Steps in which equal rewards of all answers are reported."""
ROUNDS = 4
"""Rounds of batch_size problems that dynamic sampling may try in a step, to find enough with unequal rewards."""


def train(config: RLConfig, hooks: Hooks | None = None) -> Result:
    """Run RL, or continue from the newest checkpoint; `Reinforcement` has the steps."""
    accelerator = compute_init(config.seed, config.mixed_precision, config.log_with, str(config.out))
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=torch.float32)  # bf16 would round away most updates
    T = model.config.max_position_embeddings
    suite = load_suite(config)
    task, left_out = filter_by_length(read_task(config, "train"), tokenizer, T - config.max_new_tokens)
    accelerator.print(f"{len(task):,} problems; {left_out:,} more leave no room for an answer in a context of {T}")
    measured: Task = next(iter(suite.tasks.values()))
    if config.num_problems is not None:
        task = measured = Subset(task, shuffled(len(task), config.seed, 0)[: config.num_problems])
    reward = None if config.reward is None else TRLGrader(load(config.reward, "--reward"))
    source = config.task or str(config.problems or "openai/gsm8k")
    trained_on = [(source, f"{len(task):,} problems, right answers rewarded")]
    replay = None
    if config.replay is not None:
        data = load_sft_data(config.replay, tokenizer, T)
        accelerator.print(data.describe())
        trained_on += [(name, f"in the replay: {words}") for name, words in data.counts().items()]
        replay = Epochs(data.train, T, config.seed, config.multi_turn)
    run = Run(config, "rl", accelerator)
    training = Training(run, model, tokenizer, trained_on, hooks=hooks)
    reference = load_model(config.model, accelerator.device, torch.float32).eval() if config.kl else None
    steps = Reinforcement(config, accelerator, tokenizer, run, training, task, reward, reference, replay, T)

    def evaluate(step: int, model: GPT) -> Mapping[str, float]:
        asked = [measured.get_example(i)["messages"][-1]["content"] for i in range(min(4, len(measured)))]
        asked += config.sample_prompts
        run.show(step, show_answers(Engine(model), tokenizer, asked, config.max_new_tokens))
        evaluation = evaluate_task(
            Engine(model),
            tokenizer,
            measured,
            num_samples=config.eval_samples,
            temperature=1.0,
            max_new_tokens=config.max_new_tokens,
            limit=config.eval_problems,
            quiet=True,
        )
        passes = [figure["value"] for name, figure in evaluation.summary.items() if name.startswith("pass@")]
        if config.num_problems is not None:
            right = [sum(sample["reward"] == 1.0 for sample in record["samples"]) for record in evaluation.records]
            print(
                f"{len(right)} problems, step {step}: {passes[0] * len(right):.1f} right as a mean of {config.eval_samples} "
                f"samples; of each: {' '.join(map(str, right))}",
                flush=True,
            )
        return {metrics.PASS_AT_1: passes[0], metrics.PASS_AT_K: passes[-1]}

    if not training.fit(steps.updates, evaluate, "reinforcing"):
        return Result(training.step, finished=False)
    return training.finish()


@dataclass(frozen=True)
class Reinforcement:
    """The steps of a run, each a function of the seed, its number and the model.

    1. Draw the step's problems, the same for any number of processes; process r takes every world-th.
    2. Roll out K answers of each, score them, and weigh each by its advantage.
    3. One update on them, or several, plus a share of SFT conversations.
    """

    config: RLConfig
    accelerator: Accelerator
    tokenizer: Tokenizer
    run: Run
    training: Training
    task: Task
    reward: TRLGrader | None
    """Grades in place of the task."""
    reference: GPT | None
    """The model that the KL is measured to."""
    replay: Epochs | None
    context: int
    """Tokens of a row."""

    def updates(self, step: int) -> Iterator[Update]:
        """Sample, and yield the updates on what was sampled."""
        sampled, kept = self.sample(step)
        if step % self.config.eval_every == 0:
            self.run.show(step, [row for group in sampled[:1] for row in show_group(group, self.tokenizer)])
        of_rollouts = summarize(gather_object(sampled))
        if step < FIRST_STEPS and of_rollouts[metrics.REWARD_STD] == 0:
            self.accelerator.print(
                f"step {step}: every answer earned {of_rollouts[metrics.REWARD]:g}, so there is nothing to learn from. Look at "
                f"{self.config.out / 'samples.jsonl'}; teach the form of an answer by SFT, take easier problems, raise "
                "--samples or --max-new-tokens, or let --reward give part of the reward for part of the way"
            )
        for terms, of_update in self.terms(step, [r for group in kept for r in group]):
            yield Update(terms, of_rollouts | of_update)

    def sample(self, step: int) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """This process's groups of a step: all that were sampled, and those to train on.

        Dynamic sampling goes on to further problems until batch_size groups have unequal rewards, or ROUNDS are over.
        """
        config, world = self.config, self.accelerator.num_processes
        size, rounds = config.batch_size, ROUNDS if config.dynamic_sampling else 1
        # Step s owns entries s * rounds * size and on: rounds of them may be needed, so a resumed run draws the same.
        chosen = draw(len(self.task), config.seed, step * rounds * size, rounds * size)
        sampled, telling = dict[int, list[Rollout]](), list[int]()
        by_task = grade_one_by_one(self.task)
        grader = by_task if self.reward is None else self.reward.at_step(step, config.max_steps)
        with generating(self.accelerator, self.training.model) as model:
            engine = Engine(model)
            for first in range(0, rounds * size, size):
                mine = range(first + self.accelerator.process_index, first + size, world)
                groups = roll_out(
                    engine,
                    self.tokenizer,
                    grader,
                    [self.task.get_example(chosen[i]) for i in mine],
                    [seed_of(config.seed, step, i) for i in mine],
                    num_samples=config.samples,
                    max_new_tokens=config.max_new_tokens,
                    advantage=config.advantage,
                )
                sampled |= zip(mine, groups, strict=True)
                telling += sorted(gather_object([i for i in mine if any(r.advantage for r in sampled[i])]))
                if len(telling) >= size:
                    break
        kept = set(telling[:size]) if config.dynamic_sampling else sampled.keys()
        return list(sampled.values()), [group for i, group in sampled.items() if i in kept]

    def terms(self, step: int, rollouts: list[Rollout]) -> Iterator[tuple[list[Term], dict[str, float]]]:
        """Yield the loss terms of each update on a step's rollouts, the same rows with new weights, and their metrics."""
        config, T, pad, size = self.config, self.context, self.tokenizer.pad, self.config.micro_batch_size
        lengths = [r.length for r in rollouts]
        # Zero advantage and no KL: no gradient, so such a rollout is not computed. It counts in N, as a zero in the mean.
        useful = [r for r in rollouts if r.advantage != 0 or config.kl]
        left_out = sum(lengths) - sum(r.length for r in useful)
        count = normalizer(lengths, config.normalization, config.max_new_tokens)
        parts = lay_out([r.piece for r in useful], T, size)
        # Every process needs the same number of micro-batches: short ones add empty ones.
        parts += [[] for _ in range(max(1, *gather_object([len(parts)])) - len(parts))]
        others = []
        if self.replay is not None:
            again = self.replay.rows(step * config.replay_rows, config.replay_rows)
            micro = split_rows(again, size, self.accelerator)
            others.append(Term(batches_of(micro, T, pad), config.replay_weight))
        for weights, figures in self.weights(useful, sum(lengths)):
            # Here A meets the tokens: collate spreads `weight` over the sampled ones (not the prompt, not tool outputs; the
            # stop token is one of them), and train_step makes of it sum(weight * -log p) / N.
            pieces = [
                replace(r.piece, weight=weight * length_weight(r.length, config.normalization))
                for r, weight in zip(useful, weights, strict=True)
            ]
            batches = [assemble(part, pieces, pad) for part in parts]
            yield [Term(batches, left_out=left_out, count=count), *others], figures

    def weights(
        self, rollouts: list[Rollout], tokens: int
    ) -> Iterator[tuple[list[float] | list[np.ndarray], dict[str, float]]]:
        """Yield the weight of each rollout's tokens in each update: the advantage, while the policy is the one that sampled.

        Later updates, and a KL, need the log-probabilities of three policies: one pass without gradients for each.
        """
        config = self.config
        if config.epochs == 1 and self.reference is None:
            yield [r.advantage for r in rollouts], {}
            return
        pieces = [r.piece for r in rollouts]
        size, totals = (self.context, config.micro_batch_size), np.zeros(3)  # clipped, KL and all tokens so far
        # now: the model as it is. old: as it was when it sampled. near: the reference, which the KL pulls to.
        old = near = list[np.ndarray]()
        for epoch in range(config.epochs):
            with generating(self.accelerator, self.training.model) as model, self.accelerator.autocast():
                now = token_logprobs(model, pieces, *size)
                if epoch == 0:
                    old = now
                    near = now if self.reference is None else token_logprobs(self.reference, pieces, *size)
            bounds = {"low": config.clip_low, "high": config.clip_high, "kl": config.kl}
            found = [
                surrogate(r.advantage, *logprobs, **bounds)
                for r, *logprobs in zip(rollouts, now, old, near, strict=True)
            ]
            totals += [sum(f.clipped.sum() for f in found), sum(f.kl.sum() for f in found), tokens]
            clipped, kl, counted = np.sum(gather_object([totals]), axis=0)
            figures = {metrics.CLIP_RATIO: float(clipped / max(counted, 1))}
            if self.reference is not None:
                figures[metrics.KL] = float(kl / max(counted, 1))
            yield [f.weights for f in found], figures
