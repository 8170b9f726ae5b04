"""The same greedy tokens with and without a cache, and both speeds. Example: python scripts/generate.py -p "The sky is" -n 10"""

import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from edu.config.cli import parse, run_script
from edu.config.terminal import printable


@dataclass(frozen=True)
class Args:
    model: str = "runs/tiny/base"
    """Folder or Hub id of a model."""
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = "The sky is"
    """Text to continue."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10
    """New tokens of the first comparison; the second fills the context."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"--n {self.n}: must be at least 1")


def main() -> int:
    args = parse(Args)
    from edu.inference.engine import Engine, generate_naive
    from edu.inference.params import SamplingParams
    from edu.model.load import load_model, load_tokenizer
    from edu.training.accelerator import autodetect_device_type

    model, tokenizer = load_model(args.model, autodetect_device_type()).eval(), load_tokenizer(args.model)
    prompt = [tokenizer.bos, *tokenizer.encode(args.prompt)]
    context = model.config.max_position_embeddings
    if len(prompt) + args.n > context:
        raise ValueError(f"--prompt has {len(prompt)} tokens, --n {args.n} more: the context holds {context} in all")
    engine, same = Engine(model), True
    warm = min(3, context - len(prompt))
    for tokens in (generate_naive(model, prompt, warm), engine.stream(prompt, SamplingParams(warm, 0))):
        list(tokens)  # the first calls load and compile what the others only use
    for count in (args.n, context - len(prompt)):
        seconds, found = [], []
        for tokens in (
            generate_naive(model, prompt, count),
            engine.stream(prompt, SamplingParams(count, 0)),
        ):
            started = time.perf_counter()
            found.append(list(tokens))
            seconds.append(time.perf_counter() - started)
        if count == args.n:
            print(printable(args.prompt + tokenizer.decode(found[1])))
        same &= found[0] == found[1]
        naive, cached = (count / each for each in seconds)
        verdict = "same tokens" if found[0] == found[1] else "DIFFERENT TOKENS"
        print(f"{count} tokens: naive {naive:,.0f}/s, cached {cached:,.0f}/s ({cached / naive:.1f}x), {verdict}")
    return 0 if same else 1


if __name__ == "__main__":
    run_script(main)
