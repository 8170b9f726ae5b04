"""Seconds a step of RL: ours beside TRL's GRPOTrainer, on one core, and what both learn from as many samples (7 minutes).

Example: python benchmarks/rl.py --seeds 3

Both start from the same weights, answer the same prompts as often, with answers as long, and make the same update:
reward minus the group's mean, normalised by all tokens, one update a step, AdamW (fused), gradients clipped at 1, fp32. That
it is the same is checked: on TRL's first rollouts our step finds the gradient norm that TRL logs. They take turns of some
steps in one process bound to one core; times are CPU seconds. The reward, which anything can learn: the share of tokens in
the lower half of the vocabulary.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from string import ascii_letters, digits
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    """What to measure."""

    layers: int = 4
    channels: int = 256
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 4096
    context: int = 512
    """Tokens of our rows, into which answers are packed."""
    micro_batch_size: int = 4
    """Of our rows a forward pass."""
    prompts: int = 4
    samples: int = 8
    """Answers to each prompt."""
    new_tokens: int = 64
    lr: float = 5e-3
    seeds: int = 3
    """Trainings from other weights with other samples."""
    turns: int = 4
    """Turns of each contender in a training."""
    steps: int = 5
    """Steps a turn."""


@dataclass
class Clock:
    """CPU seconds of the parts of a turn, and the rewards of its steps."""

    parts: dict[str, float] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as a part's."""

        def run(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.process_time() - start

        return run


@dataclass(frozen=True)
class Prompts:
    """The conversations to answer, as a task; the reward is not its own."""

    questions: list[list[dict[str, str]]]

    def __len__(self) -> int:
        return len(self.questions)

    def get_example(self, index: int) -> dict[str, Any]:
        return {"messages": self.questions[index], "answer": ""}

    def reward(self, example: dict[str, Any], completion: str) -> float:
        raise NotImplementedError


Turn = Callable[[int], Clock]
"""The steps of one turn, given its number; the weights go on from the turn before."""
PARTS = ("generation", "forward", "backward, update, rest")


def main() -> None:
    args = parse(Args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM
    from transformers.utils import logging
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from edu.chat.chat_format import render_prompt
    from edu.config.rl import RLConfig
    from edu.data.packing import TrainingExample, collate, pack_rows
    from edu.data.tokenizer import Tokenizer
    from edu.model.gpt import GPT, GPTConfig
    from edu.stages import rl, rollouts
    from edu.tasks.score import Score
    from edu.training.step import Term, train_step

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    pairs = ["".join(pair).encode() for pair in product(ascii_letters + digits, repeat=2)]
    ordinary = [bytes([byte]) for byte in range(256)] + pairs[: args.vocabulary - 256 - 10]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(ordinary)})
    home = tempfile.TemporaryDirectory()
    tokenizer.save(home.name)
    theirs: Any = AutoTokenizer.from_pretrained(home.name)
    rng = Random(0)
    questions = [
        [
            {
                "role": "user",
                "content": " ".join(rng.choice(["sun", "hat", "cat"]) for _ in range(8 + 24 * i // args.prompts)),
            }
        ]
        for i in range(args.prompts)
    ]
    lengths = [len(render_prompt(question, tokenizer)) for question in questions]
    assert lengths == [len(theirs.apply_chat_template(q, add_generation_prompt=True).input_ids) for q in questions]

    def reward(tokens: Sequence[int]) -> float:
        return sum(token < args.vocabulary // 2 for token in tokens) / len(tokens)

    def rewarded(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [reward(tokens) for tokens in completion_ids]

    def adamw(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)

    def ours(first: GPT, seed: int) -> Turn:
        model = GPT(first.config)
        model.load_state_dict(first.state_dict())
        optimizer: Any = Accelerator(cpu=True).prepare(adamw(model))
        config = RLConfig(
            batch_size=args.prompts, samples=args.samples, max_new_tokens=args.new_tokens, seed=seed, eval_every=10**9,
            micro_batch_size=args.micro_batch_size,
        )  # fmt: skip
        forward = model.forward

        def turn(number: int) -> Clock:
            accelerator = Accelerator(cpu=True)  # a Trainer that ran before has reset accelerate's state
            clock, run = Clock(), cast(Any, SimpleNamespace(model=model))  # of a run it needs the model alone
            steps = rl.Reinforcement(
                config, accelerator, tokenizer, run, run, Prompts(questions), None, None, None, args.context
            )
            model.forward = clock.timed("forward", forward)
            rolling = clock.timed("generation", rollouts.roll_out)
            scored = patch.object(rollouts, "score_all", lambda samples, *_: [Score(reward(s.tokens)) for s in samples])

            def step(index: int) -> None:
                measured = {}
                for update in steps.updates(index):
                    train_step(accelerator, model, optimizer, update.terms)
                    measured |= update.metrics
                clock.rewards.append(measured["reward"])

            without_tools = patch.object(rollouts, "calculator_tool", lambda _: None)
            with scored, without_tools, patch.object(rl, "roll_out", rolling):
                for i in range(args.steps):
                    clock.timed("all", step)(1 + number * args.steps + i)
            return clock

        return turn

    def trl(first: GPT, seed: int) -> Turn:
        model = NanoChatForCausalLM(first.config)
        model.load_state_dict(first.state_dict())
        optimizer = adamw(model)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        data = Dataset.from_list([{"prompt": question} for question in questions])

        def turn(number: int) -> Clock:
            clock = Clock()

            class Times(TrainerCallback):
                """From the start of a step, before it samples, to its end."""

                started = 0.0

                def on_step_begin(self, *_: Any, **__: Any) -> None:
                    self.started = time.process_time()

                def on_step_end(self, *_: Any, **__: Any) -> None:
                    clock.parts["all"] = clock.parts.get("all", 0.0) + time.process_time() - self.started

                def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                    if "reward" in logs:
                        clock.rewards.append(logs["reward"])
                        norms.append(logs["grad_norm"])

            norms = list[float]()
            rows = args.prompts * args.samples
            settings = GRPOConfig(
                "unused", per_device_train_batch_size=rows, num_generations=args.samples, max_steps=args.steps,
                max_completion_length=args.new_tokens, scale_rewards="none", loss_type="dapo", bf16=False, use_cpu=True,
                gradient_checkpointing=False, learning_rate=args.lr, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, seed=1000 * seed + number,
            )  # fmt: skip
            trainer: Any = GRPOTrainer(
                model, rewarded, args=settings, train_dataset=data, processing_class=theirs, callbacks=[Times()],
                optimizers=(optimizer, constant),
            )  # fmt: skip
            seen, loss = list[dict[str, Any]](), trainer._compute_loss

            def noted(model: Any, inputs: dict[str, Any]) -> Any:
                seen.append(inputs)
                return loss(model, inputs)

            if number == 0:
                trainer._compute_loss = noted
            trainer._generate_single_turn = clock.timed("generation", trainer._generate_single_turn)
            logprobs = "_get_per_token_logps_and_entropies"
            setattr(trainer, logprobs, clock.timed("forward", getattr(trainer, logprobs)))
            with patch("builtins.print"):
                trainer.train()
            if number == 0:
                agree.append((norms[0], our_norm(first, seen[0])))
            return clock

        return turn

    def our_norm(first: GPT, inputs: dict[str, Any]) -> float:
        """The gradient norm that our step has on TRL's rollouts."""
        model = GPT(first.config)
        model.load_state_dict(first.state_dict())
        accelerator, pieces = Accelerator(cpu=True), []
        named = [inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
        for before, real, after, said, advantage in zip(*named, inputs["advantages"].tolist(), strict=True):
            prompt, answer = before[real.bool()].tolist(), after[said.bool()].tolist()
            pieces.append(TrainingExample(prompt + answer, [0] * len(prompt) + [1] * len(answer), advantage))
        rows = [[pieces[i] for i in row] for row in pack_rows(pieces, args.context)]
        optimizer: Any = accelerator.prepare(adamw(model))
        return train_step(accelerator, model, optimizer, [Term([collate(rows, args.context)])]).grad_norm

    agree = list[tuple[float, float]]()
    clocks: dict[str, list[list[Clock]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        sizes = {"hidden_size": args.channels, "intermediate_size": 4 * args.channels, "num_hidden_layers": args.layers}
        sizes |= {"num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads}
        sizes |= {"vocab_size": args.vocabulary, "max_position_embeddings": args.context}
        first = GPT(GPTConfig.tiny(**sizes))
        contenders = {"ours": ours(first, seed), "TRL GRPOTrainer": trl(first, seed)}
        turns = {name: list[Clock]() for name in contenders}
        for number in range(args.turns):
            for name, turn in contenders.items():
                turns[name].append(turn(number))
        for name, found in turns.items():
            clocks.setdefault(name, []).append(found)

    print(f"prompts of {min(lengths)} to {max(lengths)} tokens, {args.prompts} x {args.samples} x {args.new_tokens}")
    print("gradient norm on TRL's first rollouts, TRL's and ours: " + "; ".join(f"{a:.6f}, {b:.6f}" for a, b in agree))
    print(f"| contender | s a step | {' | '.join(PARTS)} | ours is faster by |\n|{'--|' * (len(PARTS) + 3)}")
    flat = {name: [clock for training in found for clock in training] for name, found in clocks.items()}
    for name, found in flat.items():
        for clock in found:
            clock.parts[PARTS[2]] = clock.parts["all"] - clock.parts["generation"] - clock.parts["forward"]
        medians = [statistics.median(clock.parts[part] for clock in found) / args.steps for part in ("all", *PARTS)]
        ratios = [a.parts["all"] / b.parts["all"] for a, b in zip(found, flat["ours"], strict=True)]
        faster = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} | {'' if name == 'ours' else faster} |")
    blocks = [f"{1 + i * args.steps}-{(i + 1) * args.steps}" for i in range(args.turns)]
    print(f"\n| reward in steps | {' | '.join(blocks)} |\n|{'--|' * (args.turns + 1)}")
    for name, trainings in clocks.items():
        for seed, training in enumerate(trainings):
            print(f"| {name}, seed {seed} | {' | '.join(f'{statistics.fmean(c.rewards):.3f}' for c in training)} |")


if __name__ == "__main__":
    run_script(main)
