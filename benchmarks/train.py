"""Tokens/s trained: our step beside a plain loop over the stock model and transformers' Trainer, on one core (5 minutes).

Example: python benchmarks/train.py --compile

All hold the same weights, see the same batches and make the same update with the same optimizer (AdamW, fused), in fp32; the
losses are compared. They take turns of some steps, several rounds, in one process bound to one core; times are CPU
seconds. "Muon" is our default optimizer, which does more work a step. Beside them: the time that the matrix products
alone would take at the speed of a square one, which nothing on this machine beats; and the most bytes that torch held
at once during a turn beyond weights and optimizer, for each token of the batch.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    """What to measure."""

    layers: int = 4
    channels: int = 256
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 4096
    sequence_length: int = 256
    batch_size: int = 8
    rounds: int = 5
    """Turns of each contender."""
    steps: int = 3
    """Steps a turn."""
    compile: bool = False
    """Measure the compiled models too: minutes of compiling."""
    trainer: bool = True
    """Measure transformers' Trainer too."""


Turn = Callable[[], tuple[float, float]]
"""One turn of steps: (CPU seconds, the last step's loss)."""


def matmul_speed() -> float:
    """Floating-point operations a second of a square product."""
    import torch

    from edu.model.linear import product

    a = torch.randn(1024, 1024)

    def once() -> float:
        start = time.process_time()
        product(a, a)
        return 2 * 1024**3 / (time.process_time() - start)

    return statistics.median(once() for _ in range(10))


def peak_bytes(turn: Turn) -> int:
    """The most that torch's CPU allocator held during a turn, beyond what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        turn()
    recorded: Any = profiled.profiler
    events = recorded.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def main() -> None:
    args = parse(Args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from accelerate import Accelerator
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM
    from transformers.utils import logging

    from edu.data.packing import Batch
    from edu.model.gpt import GPT, GPTConfig
    from edu.training.optimizer import make_optimizer
    from edu.training.step import Term, train_step

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    B, T = args.batch_size, args.sequence_length
    sizes = {"vocab_size": args.vocabulary, "hidden_size": args.channels, "intermediate_size": 4 * args.channels}
    sizes |= {"num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads}
    torch.manual_seed(0)
    first = GPT(GPTConfig.tiny(**sizes, max_position_embeddings=T))
    rows = torch.randint(0, args.vocabulary, (B, T + 1))

    def adamw(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def ours(compiled: bool, muon: bool) -> Turn:
        model = GPT(first.config)
        model.load_state_dict(first.state_dict())
        if compiled:
            model.compile()
        rates = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.0}
        optimizer: Any = Accelerator(cpu=True).prepare(make_optimizer(model, **rates) if muon else adamw(model))
        positions = torch.arange(T).expand(B, T)
        batch = Batch(rows[:, :-1], rows[:, 1:], torch.ones(B, T), positions)

        def turn() -> tuple[float, float]:
            accelerator = Accelerator(cpu=True)  # a Trainer that ran before has reset accelerate's state
            start = time.process_time()
            losses = [train_step(accelerator, model, optimizer, [Term([batch])]).losses[0] for _ in range(args.steps)]
            return time.process_time() - start, losses[-1]

        return turn

    def plain(compiled: bool) -> Turn:
        model: Any = NanoChatForCausalLM(first.config)
        model.load_state_dict(first.state_dict())
        optimizer = adamw(model)
        run = torch.compile(model) if compiled else model

        def turn() -> tuple[float, float]:
            start, loss = time.process_time(), torch.zeros(())
            for _ in range(args.steps):
                loss = torch.nn.functional.cross_entropy(
                    run(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten()
                )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            return time.process_time() - start, loss.item()

        return turn

    def trainer() -> Turn:
        model = NanoChatForCausalLM(first.config)
        model.load_state_dict(first.state_dict())
        optimizer = adamw(model)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        settings = TrainingArguments(
            "unused", max_steps=args.steps, per_device_train_batch_size=B, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, logging_strategy="no", max_grad_norm=1.0,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows] * args.steps

        def turn() -> tuple[float, float]:
            hugging = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, constant))
            hugging.remove_callback(PrinterCallback)
            start = time.process_time()
            result = hugging.train()
            return time.process_time() - start, result.training_loss

        return turn

    contenders = {"ours": ours(False, False), "ours, Muon": ours(False, True), "plain loop, stock model": plain(False)}
    if args.trainer:
        contenders["transformers' Trainer (T + 1 tokens)"] = trainer()
    if args.compile:
        contenders |= {"ours, compiled": ours(True, False), "plain loop, stock model, compiled": plain(True)}
    speed, seconds, losses = matmul_speed(), {name: [] for name in contenders}, {}
    for name, turn in contenders.items():
        losses[name] = turn()[1]  # warms up, compiles
    for _ in range(args.rounds):
        for name, turn in contenders.items():
            seconds[name].append(turn()[0])
    memory = {name: peak_bytes(turn) for name, turn in contenders.items()}
    weights = sum(p.numel() for name, p in first.named_parameters() if "embed" not in name)
    ceiling = speed / (6 * weights)
    print(f"square matrix product: {speed / 1e9:.0f} GFLOP/s; products alone: {ceiling:,.0f} tokens/s")
    print(
        "| contender | tokens/s | share of products alone | ours is faster by | kB a token | loss after the first turn |"
    )
    print("|--|--|--|--|--|--|")
    for name, times in seconds.items():
        tokens = args.steps * B * T
        reference = seconds["ours, compiled" if "compiled" in name else "ours"]
        ratios = [a / b for a, b in zip(times, reference, strict=True)]
        rate = tokens / statistics.median(times)
        faster = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        print(
            f"| {name} | {rate:,.0f} | {rate / ceiling:.0%} | {faster} | {memory[name] / B / T / 1e3:.1f} | {losses[name]:.6f} |"
        )


if __name__ == "__main__":
    run_script(main)
