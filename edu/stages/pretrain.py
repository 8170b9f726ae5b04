"""Pretraining: predict the next token of every document. From shards and a tokenizer to a base model."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from edu.config.metrics import BPB
from edu.config.pretrain import PretrainConfig
from edu.config.terminal import duration
from edu.data.loader import LoaderState, stream_batches, validation_batches
from edu.data.packing import Batch
from edu.data.shards import list_shards, read_manifest
from edu.data.tokenizer import Tokenizer
from edu.evaluation.bits_per_byte import bits_per_byte, ngram_bits_per_byte
from edu.evaluation.suite import show_continuations
from edu.inference.engine import Engine
from edu.model.gpt import GPT, GPTConfig
from edu.training.accelerator import compute_init, peak_memory
from edu.training.loop import Hooks, Result, Training, Update
from edu.training.run import Run
from edu.training.step import Term

NGRAM_TOKENS = 20_000_000
"""The unigram and bigram models beside the result count at most so many of the training tokens."""
USUAL_MFU = 0.4
"""Utilization that a run's time is estimated with."""


def make_model(config: PretrainConfig, tokenizer: Tokenizer) -> GPT:
    """Return a fresh model of the configured size, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    given: dict[str, Any] = {
        "bos_token_id": tokenizer.bos,
        # A generation ends with a turn; with a call, whose output only the caller can give; with a document.
        "eos_token_id": [tokenizer.assistant_end, tokenizer.python_end, tokenizer.bos],
        "pad_token_id": tokenizer.pad,
    }
    given |= {"max_position_embeddings": config.sequence_length}
    given |= {"hidden_size": config.channels, "intermediate_size": 4 * config.channels}
    given |= {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads}
    return GPT(GPTConfig(vocab_size=tokenizer.vocab_size, num_hidden_layers=config.layers, **given))


def rows_per_pass(config: PretrainConfig, world_size: int) -> tuple[int, int]:
    """Return the rows of one forward pass on one process, and the number of passes that make a step."""
    rows, rest = divmod(config.batch_size, world_size)
    micro = min(config.micro_batch_size, rows)
    if rest or not micro or rows % micro:
        parts = f"{world_size} processes x --micro-batch-size {max(micro, 1)}"
        raise ValueError(f"--batch-size {config.batch_size}: must be a multiple of {parts}")
    return micro, rows // micro


def origin(data: Path) -> str:
    """Return the origin of a folder's shards: a Hub id, or an address; the folder itself where it does not say."""
    name = next((entry["source"] for entry in read_manifest(data).values()), str(data))
    repo, _, rest = name.partition(":")
    return name if rest.startswith("//") else repo


def announce(config: PretrainConfig, training: Training) -> dict[str, Any]:
    """Print the run's size and expected cost; return the estimates, to compare with the cost measured."""
    accelerator, sizes, T = training.accelerator, training.sizes, config.sequence_length
    tokens = config.max_steps * config.batch_size * T
    flops, devices = tokens * sizes.flops_per_token(T), accelerator.num_processes
    seconds = flops / (USUAL_MFU * training.peak * devices)
    memory = sizes.memory(config.micro_batch_size, T, 4 if accelerator.mixed_precision == "no" else 2) / 2**30
    accelerator.print(
        f"{sizes.layers} blocks of {sizes.channels} channels, {sizes.heads} heads on {sizes.kv_heads}: "
        f"{sizes.parameters:,} parameters. {config.max_steps:,} steps x {config.batch_size} rows x {T} = "
        f"{tokens:,} tokens, learning rates x {config.lr_scale:.3g}\n"
        f"expected: {flops:.2g} FLOPs, {duration(seconds)} at {USUAL_MFU:.0%} of {devices} x {training.peak / 1e12:.2g} "
        f"TFLOP/s, {memory:.2g} GiB a device"
    )
    kilobytes = memory * 2**30 / 1e3 / (config.micro_batch_size * T)
    return {"flops": flops, "seconds": seconds, "memory_gib": memory, "memory_kb_per_token": kilobytes}


class Documents:
    """Endless batches of documents with their position, which a checkpoint keeps."""

    def __init__(self, open_at: Callable[[LoaderState | None], Iterator[tuple[Batch, LoaderState]]]) -> None:
        self.open_at, self.state = open_at, cast(LoaderState | None, None)

    @cached_property
    def batches(self) -> Iterator[tuple[Batch, LoaderState]]:
        """Open the shards at the position, when the first batch is taken."""
        return self.open_at(self.state)

    def take(self, count: int) -> list[Batch]:
        """Return the next `count` batches."""
        batches, states = zip(*islice(self.batches, count), strict=True)
        self.state = states[-1]
        return list(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch taken; {} before the first one."""
        return {} if self.state is None else self.state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.state = LoaderState.from_dict(state_dict)


def train(config: PretrainConfig, hooks: Hooks | None = None) -> Result:
    """Pretrain, or continue from the newest checkpoint: loss over every next token, bits per byte on the validation split."""
    accelerator = compute_init(config.seed, config.mixed_precision, config.log_with, str(config.out))
    tokenizer = Tokenizer.load(config.tokenizer)
    shards, held_out = list_shards(config.data, "train"), list_shards(config.data, "val")
    rank, world = accelerator.process_index, accelerator.num_processes
    micro, passes = rows_per_pass(config, world)
    tokens = config.max_steps * config.batch_size * config.sequence_length
    trained_on = [(origin(config.data), f"{tokens:,} tokens; shards there: {len(shards):,}")]
    run = Run(config, "base", accelerator)
    memory = peak_memory(accelerator.device.type)
    open_shards = partial(stream_batches, shards, tokenizer, micro, config.sequence_length, on_bad=config.on_bad_shard)
    stream = Documents(lambda state: open_shards(rank, world, state))
    training = Training(run, make_model(config, tokenizer), tokenizer, trained_on, stream, hooks)
    expected = announce(config, training)

    def updates(_: int) -> Iterator[Update]:
        yield Update([Term(stream.take(passes))])

    def validation(times: int) -> Iterator[Batch]:
        """Return `times` the held-out rows of an evaluation."""
        count = times * config.eval_batches * config.batch_size // micro
        return validation_batches(held_out, tokenizer, micro, config.sequence_length, count)

    def evaluate(step: int, model: GPT) -> Mapping[str, float]:
        run.show(step, show_continuations(Engine(model), tokenizer, config.sample_prompts, 48))
        return {BPB: bits_per_byte(model, validation(1), tokenizer.token_bytes())}

    if not training.fit(updates, evaluate, "pretraining"):
        return Result(training.step, finished=False)

    def measure(model: GPT) -> dict[str, Any]:
        """Measure bits per byte on more held-out rows, beside unigrams and bigrams of the same tokens, and the cost."""
        counted = min(tokens, NGRAM_TOKENS)
        seen = (batch for batch, _ in islice(open_shards(), counted // (micro * config.sequence_length)))
        ngrams = ngram_bits_per_byte(seen, validation(20), tokenizer.token_bytes(), tokenizer.vocab_size)
        bpb = {"model": bits_per_byte(model, validation(20), tokenizer.token_bytes()), **ngrams}
        grown = peak_memory(accelerator.device.type) - memory
        took = {"seconds": run.seconds(), "memory_gib": grown / 2**30}
        took["memory_kb_per_token"] = grown / 1e3 / (config.micro_batch_size * config.sequence_length)
        accelerator.print(
            f"took {duration(took['seconds'])} ({duration(expected['seconds'])} expected), "
            f"{took['memory_gib']:.2g} GiB ({expected['memory_gib']:.2g}), {took['memory_kb_per_token']:.3g} kB a token"
        )
        cost = {name: {"expected": expected[name], "measured": value} for name, value in took.items()}
        return {"ngram_tokens": counted, "bpb": bpb, "cost": cost}

    return training.finish(measure)
