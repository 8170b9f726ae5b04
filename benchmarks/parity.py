"""How far our GPT is from transformers' own nanochat, on the same folder: what, stock, ours, difference (a minute).

Example: python benchmarks/parity.py --model runs/tiny/rl

Without --model, three random models are compared. The yardstick is stock's own: the difference between its eager and its sdpa
attention. Each row gives the mean size of stock's and our values, the largest difference between them, and the yardstick.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edu.config.cli import parse, run_script


@dataclass(frozen=True)
class Args:
    """What to compare."""

    model: Path | None = None
    """Folder of a checkpoint; none: random models."""
    rows: int = 4
    """Rows of a batch; random tokens over the whole context, at most 256."""


def gradients(model: Any, ids: Any) -> Any:
    """All gradients of the loss of `labels`, in one vector."""
    import torch

    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])


def compare(folder: Path, rows: int) -> None:
    """The rows of one folder's table."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    from edu.inference.engine import Engine
    from edu.model.gpt import GPT
    from edu.model.kv_cache import KVCache

    ours: Any = GPT.from_pretrained(folder).eval()
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    eager: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    context = min(256, ours.config.max_position_embeddings)
    ids = torch.randint(0, ours.config.vocab_size - 10, (rows, context), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    for row in range(rows):
        padding[row, : row * context // (2 * rows)] = 0
    packed = {"position_ids": (torch.arange(context) % (context // 3)).expand(rows, -1), "use_cache": False}
    cases = {
        "logits, fp32": lambda model: model(ids).logits,
        "logits, padded on the left": lambda model: model(ids, attention_mask=padding).logits[padding.bool()],
        "logits, every third position": lambda model: model(ids, position_ids=3 * torch.arange(context)[None]).logits,
        "logits, packed documents": lambda model: model(ids, **packed).logits,
        "loss of `labels`": lambda model: model(ids, labels=ids).loss[None],
        "gradients, all": lambda model: gradients(model, ids),
        "logits, bf16": lambda model: model.bfloat16()(ids).logits.float(),  # last: it narrows the weights
    }

    def line(what: str, a: Any, b: Any, yardstick: Any) -> None:
        off, own = (float((a - other).abs().max()) for other in (b, yardstick))
        print(f"| {what} | {a.abs().mean():.6f} | {b.abs().mean():.6f} | {off:.1e} | {own:.1e} |", flush=True)

    prompts, new = ids[:, : context // 2], context // 4
    stops = stock.generation_config.eos_token_id or []
    stops = [stops] if isinstance(stops, int) else stops

    def generate(model: Any, **options: Any) -> list[list[int]]:
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)[:, prompts.shape[1] :]
        ends = [[i for i, token in enumerate(row) if token in stops] for row in found.tolist()]
        return [row[: end[0] + 1] if end else row for row, end in zip(found.tolist(), ends, strict=True)]

    by_stock = generate(stock)
    engine = Engine(ours).generate(prompts.tolist(), max_new_tokens=new, temperature=0, stop_tokens=stops)
    found = {
        "generate, DynamicCache": generate(ours, cache=DynamicCache(config=ours.config)),
        "generate, our KVCache": generate(ours, cache=KVCache(rows, context, ours)),
        "Engine": [sample.tokens for (sample,) in engine],
    }
    for name, run in cases.items():
        with torch.set_grad_enabled(name.startswith("gradients")):
            line(name, run(stock), run(ours), run(eager))
    for name, tokens in found.items():
        total, other = sum(map(len, by_stock)), sum(map(len, tokens))
        print(f"| greedy tokens, {name} | {total} | {other} | {'none' if tokens == by_stock else 'they differ'} | |")


def main() -> None:
    args = parse(Args)
    import torch
    import transformers
    from transformers.utils import logging

    from edu.model.gpt import GPT, GPTConfig

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | stock | ours | largest difference | stock eager - sdpa |\n|--|--|--|--|--|")
    if args.model is not None:
        compare(args.model, args.rows)
        return
    sizes = {
        "tiny, 4 heads on 2 keys": {},
        "tiny, 4 heads on 4 keys": {"num_key_value_heads": 4},
        "12 layers of 768": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 4096},
    }
    for name, overrides in sizes.items():
        print(f"| **{name}** | | | | |")
        model = GPT(GPTConfig.tiny(**overrides))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=model.config.hidden_size**-0.5)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            compare(Path(folder), args.rows)


if __name__ == "__main__":
    run_script(main)
