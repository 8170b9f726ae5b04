"""Tokens/s sampled: our Engine beside transformers' `generate` and the uncached loop, on one core (10 minutes).

Example: python benchmarks/decode.py --batches 1 16

All contenders hold the same random weights and give the same greedy tokens, which is checked. They take turns, several
rounds, in one process bound to one core; times are CPU seconds. "equal": prompts of 64 tokens, all samples go to the
end. "ragged": prompts of 8 to 64 tokens and stop tokens that end samples early, the shape of rollouts; only tokens up to
the stop count. "faster by": the median of the rounds' ratios, and the least and greatest.
Beside them three limits in tokens/s: a step that only reads the weights and what is cached half-way, one that only multiplies at
the rate of a large product, and one that only does its own products: no program that uses them is faster.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edu.config.cli import parse, run_script

SIZES = {"S": (4, 256, 4, 2), "L": (8, 512, 8, 4)}  # layers, channels, query heads, key/value heads
VOCABULARY, PROMPT = 4096, 64
COMPILED = "transformers, StaticCache, compiled"


@dataclass(frozen=True)
class Args:
    """What to measure."""

    sizes: tuple[str, ...] = ("S", "L")
    """S: 4 layers of 256 channels; L: 8 layers of 512."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Prompts at once."""
    new_tokens: int = 128
    """Tokens a sample, at most."""
    rounds: int = 5
    """Turns of each contender."""
    naive: bool = False
    """Measure the uncached loop too (batch 1)."""
    compile: bool = False
    """Measure transformers' compiled StaticCache too, and how long it compiles: a minute or two a batch size."""


Generate = Callable[[list[list[int]], int, list[int]], list[list[int]]]
"""(prompts, new tokens, stop tokens) -> the new tokens of each, up to its first stop token."""


def cut(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The tokens up to the first stop token, which is kept."""
    ends = [i for i, token in enumerate(tokens) if token in stops]
    return list(tokens[: ends[0] + 1] if ends else tokens)


def hugging_face(model: Any, **options: Any) -> Generate:
    """`generate` on a batch padded on the left."""
    import torch

    def generate(prompts: list[list[int]], new: int, stops: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": stops or None}
        out = model.generate(ids, attention_mask=mask, **settings, **options)
        return [cut(row, stops) for row in out[:, width:].tolist()]

    return generate


def ours(engine: Any, fast: bool) -> Generate:
    """The Engine, by edu/fast or by the model itself."""

    def generate(prompts: list[list[int]], new: int, stops: list[int]) -> list[list[int]]:
        os.environ["EDU_FAST"] = str(int(fast))
        groups = engine.generate(prompts, max_new_tokens=new, temperature=0, stop_tokens=stops)
        return [sample.tokens for (sample,) in groups]

    return generate


def uncached(model: Any) -> Generate:
    """The whole sequence through the model for every token."""
    from edu.inference.engine import generate_naive

    def generate(prompts: list[list[int]], new: int, stops: list[int]) -> list[list[int]]:
        return [cut(list(generate_naive(model, prompt, new)), stops) for prompt in prompts]

    return generate


def limits(model: Any, rows: int, length: int) -> str:
    """Tokens/s of a step for so many rows of so many tokens that only reads, multiplies, or does its own products."""
    import torch

    from edu.fast.cpu_decoder import CPUDecoder, ways

    def seconds(work: Callable[[], object]) -> float:
        def once() -> float:
            start = time.process_time()
            work()
            return time.process_time() - start

        return statistics.median(once() for _ in range(20))

    with torch.inference_mode():
        product, layers, head = CPUDecoder(model).weights(rows)
        square_product, arrange = ways(1024, 0)
        large, square = torch.randn(1024, 1024), arrange(torch.randn(1024, 1024))
        weights = [p for name, p in model.named_parameters() if "embed" not in name]
        config, count = model.config, sum(p.numel() for p in weights)
        cached = rows * length * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        flat, hidden = torch.ones(count + cached), torch.randn(rows, config.hidden_size)
        inputs = [torch.randn(rows, n) for n in (config.hidden_size,) * 3 + (config.intermediate_size,)]
        read = seconds(flat.sum)
        multiply = seconds(lambda: square_product(large, square)) * count * rows / 1024**3
        own = seconds(lambda: [[product(x, w) for x, w in zip(inputs, layer, strict=True)] for layer in layers])
        own += seconds(lambda: product(hidden, head))
    return " | ".join(f"{rows / each:,.0f}" for each in (read, multiply, own))


def spread(numerators: list[float], denominators: list[float]) -> str:
    """The median of the ratios, and the least and greatest."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


def agree(same: int, batch: int) -> str:
    """What to say of the samples that are the same as ours."""
    return "" if same == batch else f" ({same} of {batch} samples equal)"


def main() -> None:
    args = parse(Args)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from transformers import CompileConfig
    from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM
    from transformers.utils import logging

    from edu.inference.engine import Engine
    from edu.model.gpt import GPT, GPTConfig

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(
        "| model | batch | shape | contender | tokens/s | ours is faster by | first token, ms | ours is sooner by | reading | multiplying | own products |"
    )
    print("|--|--|--|--|--|--|--|--|--|--|--|")
    for size in args.sizes:
        layers, channels, heads, kv_heads = SIZES[size]
        sizes = {"hidden_size": channels, "intermediate_size": 4 * channels, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY}
        torch.manual_seed(0)
        model = GPT(GPTConfig.tiny(**sizes, max_position_embeddings=PROMPT + args.new_tokens)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=2 * channels**-0.5)  # far enough from zero that no two logits tie
        stock = NanoChatForCausalLM(model.config).eval()
        stock.load_state_dict(model.state_dict())
        contenders = {
            "ours": ours(Engine(model, max_rows=max(args.batches)), fast=True),
            "ours, readable path": ours(Engine(model, max_rows=max(args.batches)), fast=False),
            "transformers, DynamicCache": hugging_face(stock),
            "transformers, StaticCache": hugging_face(stock, cache_implementation="static", disable_compile=True),
        }
        if args.compile:
            everywhere = CompileConfig()
            everywhere._compile_all_devices = True  # type: ignore[assignment]  # without it a CPU is left out
            options = {"cache_implementation": "static", "compile_config": everywhere}
            contenders[COMPILED] = hugging_face(stock, **options)
        for batch in args.batches:
            for shape in ("equal", "ragged") if batch > 1 else ("equal",):
                generator = torch.Generator().manual_seed(batch)
                prompts = torch.randint(1, VOCABULARY, (batch, PROMPT), generator=generator).tolist()
                if shape == "ragged":
                    prompts = [p[: 8 + (PROMPT - 8) * i // (batch - 1)] for i, p in enumerate(prompts)]
                stops = list(range(1, VOCABULARY, 50)) if shape == "ragged" else []
                present = contenders | ({"the uncached loop": uncached(model)} if args.naive and batch == 1 else {})
                speeds: dict[str, list[float]] = {name: [] for name in present}
                firsts: dict[str, list[float]] = {name: [] for name in present}
                tokens, notes = dict[str, list[list[int]]](), dict[str, str]()
                for name, generate in present.items():
                    start = time.perf_counter()
                    generate(prompts, 1, stops)
                    tokens[name] = generate(prompts, args.new_tokens, stops)
                    seconds = time.perf_counter() - start
                    notes[name] = f" (first calls {seconds:.0f} s)" if name == COMPILED else ""
                same = {
                    name: sum(a == b for a, b in zip(out, tokens["ours"], strict=True)) for name, out in tokens.items()
                }
                for _ in range(args.rounds):
                    for name, generate in present.items():
                        start = time.process_time()
                        generate(prompts, 1, stops)
                        first = time.process_time()
                        generate(prompts, args.new_tokens, stops)
                        end = time.process_time()
                        firsts[name].append(1e3 * (first - start))
                        speeds[name].append(sum(map(len, tokens[name])) / (end - first))
                limit = limits(model, batch, PROMPT + args.new_tokens // 2)
                for name in present:
                    faster, sooner = spread(speeds["ours"], speeds[name]), spread(firsts[name], firsts["ours"])
                    print(
                        f"| {size} | {batch} | {shape} | {name}{agree(same[name], batch)}{notes[name]} | "
                        f"{statistics.median(speeds[name]):,.0f} | {'' if name == 'ours' else faster} | "
                        f"{statistics.median(firsts[name]):.0f} | {'' if name == 'ours' else sooner} | "
                        f"{limit if name == 'ours' else ' |  | '} |",
                        flush=True,
                    )


if __name__ == "__main__":
    run_script(main)
