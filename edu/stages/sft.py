"""Supervised fine-tuning: learn to answer. From a base model and conversations to a chat model."""

from collections.abc import Iterator, Mapping

from edu.chat.sft_data import Epochs, batches_of, load_sft_data
from edu.config.metrics import VAL_LOSS
from edu.config.stages import SFTConfig
from edu.data.packing import pack_rows
from edu.evaluation.measure import mean_loss, measure_chat, read_measures, show_answers
from edu.inference.engine import Engine
from edu.model.gpt import GPT
from edu.model.load import load_model, load_tokenizer
from edu.training.accelerator import compute_init
from edu.training.checkpoint import Run
from edu.training.loop import Result, Training, Update, split_rows
from edu.training.step import Term

VAL_ROWS = 256
"""Packed rows of held-out conversations of which the validation loss is the mean; more add time, not precision."""


def train(config: SFTConfig) -> Result:
    """Fine-tune, or continue where the folder stands: loss over what the assistant says, and nothing else."""
    accelerator = compute_init(config.seed, config.mixed_precision, config.log_with, str(config.out))
    tokenizer = load_tokenizer(config.model)
    T = config.sequence_length
    data = load_sft_data(config.data, tokenizer, T, config.val_every)
    accelerator.print(data.describe())
    epochs = Epochs(data.train, T, config.seed, config.multi_turn)
    held_out = [[data.val[i] for i in row] for row in pack_rows(data.val, T)][:VAL_ROWS]
    measures = read_measures(config)
    run = Run(config, "sft", accelerator, tokenizer, list(data.counts().items()))
    model = load_model(config.model)
    if (context := model.config.max_position_embeddings) < T:
        raise ValueError(f"--sequence-length {T}: {config.model} has a context of {context}")
    training = Training(run, model)

    def updates(step: int) -> Iterator[Update]:
        rows = epochs.rows(step * config.batch_size, config.batch_size)
        micro = split_rows(rows, config.micro_batch_size, accelerator)
        yield Update([Term(batches_of(micro, T, tokenizer.pad))])

    def evaluate(step: int, model: GPT) -> Mapping[str, float]:
        run.show(step, show_answers(Engine(model), tokenizer, config.sample_prompts, config.max_new_tokens))
        micro = [held_out[at : at + config.micro_batch_size] for at in range(0, len(held_out), config.micro_batch_size)]
        return {VAL_LOSS: mean_loss(model, batches_of(micro, T, tokenizer.pad))} if held_out else {}

    if not training.fit(updates, evaluate, "fine-tuning"):
        return Result(training.step, finished=False)
    return training.finish(lambda model: measure_chat(Engine(model), tokenizer, config, measures))
