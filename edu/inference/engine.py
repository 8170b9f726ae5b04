"""Sample from a GPT: the uncached loop, the same with a cache, and the Engine, for many prompts at once.

1. `generate_naive` is the definition: the whole sequence goes through the model again for every token.
2. `generate_cached` gives the same tokens with a cache of keys and values: the prompt goes through the model once
   (prefill), then one token a step (decode). The cache is edu.model.kv_cache.KVCache: each attention layer writes its
   new keys and values there and reads all earlier ones back (step 3 in CausalSelfAttention.forward).
3. `Engine` does that for many prompts, several samples of each: `edu.inference.scheduler` decides which rows take part
   in a step, and `edu.inference.decoder` runs the model on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from edu.inference.decoder import Decoder, decoder_for
from edu.inference.params import Sample, SamplingParams
from edu.inference.scheduler import Scheduler, Tool
from edu.model.gpt import GPT
from edu.model.kv_cache import KVCache

MAX_ROWS = 128
"""Default number of rows decoded at once."""
DEFAULTS = SamplingParams()


@torch.inference_mode()
def generate_naive(model: GPT, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
    """Yield greedy tokens without a cache. The n-th token costs n tokens of work."""
    ids = torch.tensor([prompt], device=model.device)  # (1, T)
    for _ in range(max_new_tokens):
        # Only the last position's logits are needed; all positions before it are computed again all the same.
        logits = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1]  # (1, V)
        token = logits.argmax(-1)
        ids = torch.cat((ids, token[:, None]), dim=1)  # (1, T + 1)
        yield int(token)


@torch.inference_mode()
def generate_cached(model: GPT, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
    """Yield the same tokens with a cache. Each token costs one token of work, and a read of everything cached."""
    cache = KVCache(1, len(prompt) + max_new_tokens, model)
    ids = torch.tensor([prompt], device=model.device)  # (1, T): the first pass, prefill, takes the whole prompt
    for _ in range(max_new_tokens):
        # The model appends the keys and values of `ids` to the cache, and attends to everything in it.
        logits = model(ids, cache=cache, logits_to_keep=1).logits[:, -1]  # (1, V)
        token = logits.argmax(-1)
        ids = token[:, None]  # (1, 1): every later pass, decode, takes the new token alone
        yield int(token)


# Each prompt is computed once, and its cache row is copied for every sample. A tool may force tokens into a sample. A
# finished row leaves, and a waiting prompt takes its place.
class Engine:
    """Generate with a GPT that is in eval mode, on the GPT's device, with its weights as they are at each call."""

    def __init__(self, model: GPT, max_rows: int = MAX_ROWS) -> None:
        self.model, self.config, self.max_rows = model, model.config, max_rows
        self.decoder: Decoder | None = None

    def scheduler(self, num_rows: int, max_seq_len: int) -> Scheduler:
        """Return a scheduler with its own cache, for requests that come and go; prompt and answer share max_seq_len tokens."""
        # On a CPU this may be edu/fast's decoder, which keeps copies of the weights: it is made anew when the weights
        # have changed.
        self.decoder = decoder_for(self.model, self.decoder)
        length = min(max_seq_len, self.config.max_position_embeddings)
        return Scheduler(self.decoder, KVCache(num_rows, length, self.model), self.config.vocab_size)

    def generate(
        self,
        prompts: Sequence[list[int]],
        num_samples: int = 1,
        params: SamplingParams = DEFAULTS,
        *,
        seed: int | Sequence[int] = 0,
        tool: Tool | None = None,
        **options: Any,
    ) -> list[list[Sample]]:
        """Return samples[prompt][sample]. Sample k of a prompt draws from (its seed, k), wherever its row is in the batch.

        One int seeds every prompt alike: equal prompts then get equal samples. `options` replace fields of `params`.
        """
        params = replace(params, **options)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
        # All samples of a prompt start together, so there are never fewer rows than num_samples.
        num_rows = max(num_samples, min(self.max_rows, num_samples * len(prompts)))
        scheduler = self.scheduler(num_rows, max(map(len, prompts), default=0) + params.max_new_tokens)
        requests = [
            scheduler.submit(prompt, params, num_samples, prompt_seed, tool)
            for prompt, prompt_seed in zip(prompts, seeds, strict=True)
        ]
        # In each step every active row gets one token; finished rows leave, waiting prompts enter.
        while scheduler.step():
            pass
        return [request.samples for request in requests]

    def stream(
        self,
        prompt: list[int],
        params: SamplingParams = DEFAULTS,
        *,
        seed: int = 0,
        tool: Tool | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """Yield the tokens of one sample, each as soon as it is known."""
        params = replace(params, **options)
        scheduler = self.scheduler(1, len(prompt) + params.max_new_tokens)
        (sample,) = scheduler.submit(prompt, params, 1, seed, tool).samples
        unfinished = True
        while unfinished:
            unfinished = scheduler.step()
            yield sample.tokens[-1]
