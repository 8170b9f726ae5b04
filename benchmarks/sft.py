"""Tokens/s of fine-tuning, padding not counted: our step beside TRL's trainer, on one core (4 minutes).

Example: python benchmarks/sft.py

All hold the same weights and train on the same conversations (lengths as in real chats, half of the tokens the
assistant's) with the same optimizer (AdamW, fused), in fp32. They take turns of some steps, several rounds, in one process
bound to one core; times are CPU seconds, collating included. TRL pads each conversation, or packs them: "bfd" whole and
apart, in one long row; "wrapped" cut, and seeing each other. "Seeing each other" is our step without its mask.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """Tokens a row; conversations are cut to it."""
    batch_size: int = 8
    rounds: int = 5
    """Turns of each contender."""
    steps: int = 2
    """Steps a turn."""
    trl: bool = True
    """Measure TRL too."""


Turn = Callable[[], tuple[int, float]]
"""One turn of steps: (tokens that are no padding, CPU seconds)."""


def conversations(count: int, longest: int, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random ids, and masks that are 1 on the second half; lengths of p10/50/90 = 43/87/192 tokens, cut at longest."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(87), 0.6, count)).astype(int).clip(16, longest)
    return [(rng.integers(2, vocabulary, n), (np.arange(n) >= n // 2).astype(int)) for n in lengths]


def main() -> None:
    args = parse(Args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import datasets
    import torch
    from accelerate import Accelerator
    from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM
    from transformers.utils import logging

    from edu.chat.sft_data import Epochs, batches_of
    from edu.data.packing import TrainingExample
    from edu.model.gpt import GPT, GPTConfig
    from edu.training.step import Term, train_step

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    B, T = args.batch_size, args.sequence_length
    sizes = {"vocab_size": args.vocabulary, "hidden_size": args.channels, "intermediate_size": 4 * args.channels}
    sizes |= {"num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads}
    torch.manual_seed(0)
    first = GPT(GPTConfig.tiny(**sizes, max_position_embeddings=T))
    chats = conversations(500, T, args.vocabulary)

    def adamw(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    class Together(torch.nn.Module):
        """The model without positions, so without a mask: rows as one document each."""

        def __init__(self, model: GPT) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor, **kwargs: Any) -> Any:
            return self.model(inputs, **kwargs | {"position_ids": None})

    def ours(apart: bool) -> Turn:
        model = GPT(first.config)
        model.load_state_dict(first.state_dict())
        optimizer: Any = Accelerator(cpu=True).prepare(adamw(model))
        trained = model if apart else Together(model)
        epochs, done = Epochs([TrainingExample(ids, mask) for ids, mask in chats], T), [0]

        def turn() -> tuple[int, float]:
            accelerator, tokens = Accelerator(cpu=True), 0
            start = time.process_time()
            for _ in range(args.steps):
                rows = epochs.rows(done[0] * B, B)
                (batch,) = batches_of([rows], T, 0)
                train_step(accelerator, trained, optimizer, [Term([batch])])
                tokens += sum(len(piece.ids) for row in rows for piece in row)
                done[0] += 1
            return tokens, time.process_time() - start

        return turn

    def trl(**packing: Any) -> Turn:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, PrinterCallback
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        model = NanoChatForCausalLM(first.config)
        model.load_state_dict(first.state_dict())
        optimizer = adamw(model)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1})), pad_token="<pad>", eos_token="<eos>"
        )
        settings = SFTConfig(
            "unused", max_steps=args.steps, per_device_train_batch_size=B, max_length=T, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, logging_strategy="no", max_grad_norm=1.0,
            activation_checkpointing=False, completion_only_loss=True, **packing,
        )  # fmt: skip
        data = datasets.Dataset.from_list(
            [{"input_ids": ids.tolist(), "completion_mask": mask.tolist()} for ids, mask in chats]
        )

        def turn() -> tuple[int, float]:
            trainer = SFTTrainer(
                model, settings, train_dataset=data, processing_class=words, optimizers=(optimizer, constant)
            )
            trainer.remove_callback(PrinterCallback)
            step, tokens = trainer.training_step, [0]

            def counted(model: Any, inputs: Any, *rest: Any) -> Any:
                mask = inputs.get("attention_mask")  # there is none where nothing is padded
                tokens[0] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
                return step(model, inputs, *rest)

            trainer.training_step = counted
            start = time.process_time()
            trainer.train()
            return tokens[0], time.process_time() - start

        return turn

    contenders = {"ours": ours(True), "ours, seeing each other": ours(False)}
    if args.trl:
        contenders["TRL, padded"] = trl()
        contenders["TRL, packed (bfd)"] = trl(packing=True, packing_strategy="bfd")
        contenders["TRL, packed (wrapped)"] = trl(packing=True, packing_strategy="wrapped")
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in contenders.values():
        turn()  # warms up
    for _ in range(args.rounds):
        for name, turn in contenders.items():
            tokens, seconds = turn()
            rates[name].append(tokens / seconds)
    print("| contender | tokens/s without padding | ours is faster by |")
    print("|--|--|--|")
    for name, each in rates.items():
        ratios = [a / b for a, b in zip(rates["ours"], each, strict=True)]
        faster = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        print(f"| {name} | {statistics.median(each):,.0f} | {faster} |")


if __name__ == "__main__":
    run_script(main)
