"""Supervised fine-tuning: learn to answer. From a base model and conversations to a chat model (challenge 8)."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from edu.chat.chat_format import calculator_tool, render_prompt, stream_text
from edu.chat.mixture import load_sft_data
from edu.chat.sft_data import Epochs, batches_of
from edu.config.metrics import VAL_LOSS
from edu.config.sft import SFTConfig
from edu.data.packing import IGNORE, Batch, pack_rows
from edu.inference.engine import Engine
from edu.inference.params import SamplingParams
from edu.model.gpt import GPT
from edu.model.load import load_model, load_tokenizer
from edu.training.accelerator import compute_init
from edu.training.loop import Hooks, Result, Training, Update, split_rows
from edu.training.run import Run
from edu.training.step import Term

VAL_ROWS = 256
"""Packed rows of held-out conversations of which the validation loss is the mean; more add time, not precision."""


def train(config: SFTConfig, hooks: Hooks | None = None) -> Result:
    """Fine-tune, or continue from the newest checkpoint: the loss is over what the assistant says, and nothing else.

    1. Render conversations to tokens with a mask, and pack them into rows of T tokens.
    2. Each step: this process's share of batch_size rows, in micro-batches; their gradients add up to one update.
    3. Each evaluation: the loss on held-out conversations, and answers to a few questions, sampled with the Engine.
    """
    accelerator = compute_init(config.seed, config.mixed_precision, config.log_with, str(config.out))
    tokenizer = load_tokenizer(config.model)
    T = config.sequence_length
    data = load_sft_data(config.data, tokenizer, T, config.val_every)
    accelerator.print(data.describe())
    epochs = Epochs(data.train, T, config.seed, config.multi_turn)
    held_out = [[data.val[i] for i in row] for row in pack_rows(data.val, T)][:VAL_ROWS]
    run = Run(config, "sft", accelerator)
    model = load_model(config.model, dtype=torch.float32)  # bf16 would round away most updates
    if (context := model.config.max_position_embeddings) < T:
        raise ValueError(f"--sequence-length {T}: {config.model} has a context of {context}")
    training = Training(run, model, tokenizer, list(data.counts().items()), hooks=hooks)

    def updates(step: int) -> Iterator[Update]:
        # The rows follow from the step alone, so a checkpoint saves no place in the data, and any number of processes trains
        # on the same ones. Each micro-batch holds micro_batch_size rows of (inputs, targets), (B, T) both; targets are
        # -1 on all that the assistant did not say. One term: its N counts the other targets of all micro-batches and
        # processes, so the update is the same however the rows are split.
        rows = epochs.rows(step * config.batch_size, config.batch_size)
        micro = split_rows(rows, config.micro_batch_size, accelerator)
        yield Update([Term(batches_of(micro, T, tokenizer.pad))])

    def evaluate(step: int, model: GPT) -> Mapping[str, float]:
        # Greedy answers, for people: they go to samples.jsonl, and from there into the report.
        prompts = [render_prompt([{"role": "user", "content": text}], tokenizer) for text in config.sample_prompts]
        params = SamplingParams(config.max_new_tokens, temperature=0, stop_tokens=[tokenizer.assistant_end])
        answers = Engine(model).generate(prompts, params=params, tool=calculator_tool(tokenizer))
        texts = ["".join(stream_text(sample.tokens, tokenizer, show_tools=True)) for (sample,) in answers]
        pairs = zip(config.sample_prompts, texts, strict=True)
        run.show(step, [{"prompt": prompt, "completion": text} for prompt, text in pairs])
        size = config.micro_batch_size
        micro = [held_out[at : at + size] for at in range(0, len(held_out), size)]
        return {VAL_LOSS: mean_loss(model, batches_of(micro, T, tokenizer.pad))} if held_out else {}

    if not training.fit(updates, evaluate, "fine-tuning"):
        return Result(training.step, finished=False)
    return training.finish()


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[Batch]) -> float:
    """Return the mean of -log p over all targets of the batches, in nats: not the mean of the batches' means."""
    total, count = 0.0, 0
    for batch in (batch.to(model.device) for batch in batches):
        total -= float(model(batch.inputs, targets=batch.targets, position_ids=batch.positions).sum())
        count += int((batch.targets != IGNORE).sum())
    return total / max(count, 1)
