"""Sample from a GPT: many prompts at once, several samples of each, rows that finish make room for those that wait.

`generate_naive` is the definition: the whole sequence through the model for every token. `Engine` gives the same tokens
from a cache of keys and values (`edu.fast.cpu_decoder`): a prompt is computed once (prefill), its cache row is copied for each
sample, then every step computes one token a row. Rows have lengths of their own: nothing is padded on the left.

B rows, K samples of a prompt, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from edu.fast.cpu_decoder import Decoder
from edu.inference.params import Sample, SamplingParams
from edu.inference.sampling import sample_tokens
from edu.model.gpt import GPT
from edu.model.kv_cache import KVCache

Tool = Callable[[list[int]], list[int]]
"""New tokens so far -> tokens to force, [] for none; raises ValueError to end the sample."""

DEFAULTS = SamplingParams()
MAX_ROWS = 128
"""Rows decoded at once unless told otherwise."""
PREFILL_CHUNK = 1024
"""Positions of all prompts computed at once: what bounds the memory of long ones."""


@dataclass
class _Row:
    """One sample being decoded."""

    length: int
    limit: int
    sample: Sample
    random: Callable[[], float]
    """The next of its own uniform numbers."""
    forced: deque[int] = field(default_factory=deque)


class Engine:
    """Generates with a GPT in eval mode on its device, with the weights that it has at each call."""

    def __init__(self, model: GPT, max_rows: int = MAX_ROWS) -> None:
        self.model, self.config, self.max_rows = model, model.config, max_rows
        self.device = model.lm_head.weight.device
        self.decoder = Decoder(model)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[list[int]], cache: KVCache, chunk: int = PREFILL_CHUNK) -> Float[Tensor, "B V"]:
        """Fill an empty cache with prompts, `chunk` positions of all at a time; the logits after each one's last token."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        width = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self.device)
        last = torch.empty(len(prompts), self.config.hidden_size, dtype=cache.memory.dtype, device=self.device)
        for start in range(0, width, chunk):
            hidden = self.decoder.extend(ids[:, start : start + chunk], [start] * len(prompts), cache)
            ends = ((start < lengths) & (lengths <= start + chunk)).nonzero().squeeze(1)
            last[ends] = hidden[ends, lengths[ends] - 1 - start]
        return self.decoder.logits(last)

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
        """Return samples [prompt][sample]. Sample k of a prompt draws from (its seed, k), wherever it stands in the batch.

        Keywords of SamplingParams replace what `params` says.
        """
        samples = [[Sample() for _ in range(num_samples)] for _ in prompts]
        for _ in self._run(prompts, samples, replace(params, **options), seed, tool):
            pass
        return samples

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
        samples = [[Sample()]]
        for _ in self._run([prompt], samples, replace(params, **options), seed, tool):
            yield samples[0][0].tokens[-1]

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[list[int]],
        samples: list[list[Sample]],
        params: SamplingParams,
        seed: int | Sequence[int],
        tool: Tool | None,
    ) -> Iterator[None]:
        """Decode until every sample is finished; one yield a step.

        1. Admit waiting prompts while there are rows for all samples of the next one: prefill, copy its cache row.
        2. Choose each row's next token: forced by its tool, or sampled.
        3. Drop the finished rows, moving rows from the end into their places, and decode the others.
        """
        context = self.config.max_position_embeddings
        check_request(prompts, samples, seed, context, self.config.vocab_size)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        K = len(samples[0]) if samples else 0
        capacity = max(K, min(self.max_rows, K * len(prompts)))
        room = min(context, max(map(len, prompts), default=0) + params.max_new_tokens)
        if not self.decoder.is_current:
            self.decoder = Decoder(self.model)
        cache = KVCache(capacity, room, self.model)
        waiting, rows = deque(range(len(prompts))), list[_Row]()
        logits = torch.empty(0, self.config.vocab_size, device=self.device)
        while waiting or rows:
            arrivals = list[int]()
            while waiting and len(rows) + (len(arrivals) + 1) * K <= capacity:
                arrivals.append(waiting.popleft())
            for group in _alike(arrivals, prompts):
                longest = len(prompts[group[-1]])
                fresh = KVCache(len(group), longest, self.model)
                first = self.prefill([prompts[i] for i in group], fresh)
                forks = [(place, i, k) for place, i in enumerate(group) for k in range(K)]
                at = range(len(rows), len(rows) + len(forks))
                cache.copy_rows(list(at), [place for place, _, _ in forks], longest, fresh)
                logits = torch.cat((logits, first.repeat_interleave(K, 0)))
                for _, i, k in forks:
                    limit = min(params.max_new_tokens, context - len(prompts[i]))
                    draws = np.random.default_rng((seeds[i], k))
                    rows.append(_Row(len(prompts[i]), limit, samples[i][k], draws.random))
            uniforms = torch.tensor([row.random() for row in rows], device=self.device)
            chosen, logprobs = sample_tokens(logits, uniforms, params)
            live = [
                _advance(row, token, logprob, params.stop_tokens, tool)
                for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)
            ]
            yield
            rows = self._compact(rows, live, cache)
            if rows:
                newest = torch.tensor([row.sample.tokens[-1] for row in rows], device=self.device)
                logits = self.decoder.step(newest, [row.length for row in rows], cache)
                for row in rows:
                    row.length += 1
            else:
                logits = logits[:0]

    @staticmethod
    def _compact(rows: list[_Row], live: list[bool], cache: KVCache) -> list[_Row]:
        """Close the gaps of finished rows with rows from the end; the live ones are the cache's first rows again."""
        count = sum(live)
        gaps = [i for i in range(count) if not live[i]]
        movers = [i for i in range(count, len(rows)) if live[i]]
        cache.copy_rows(gaps, movers, max((rows[i].length for i in movers), default=0))
        for gap, mover in zip(gaps, movers, strict=True):
            rows[gap] = rows[mover]
        return rows[:count]


def _alike(arrivals: Sequence[int], prompts: Sequence[list[int]]) -> list[list[int]]:
    """The arrivals, shortest first, in groups so alike in length that padding a group costs little.

    >>> _alike([0, 1, 2, 3], [[1] * 900, [1] * 8, [1] * 1000, [1] * 7])
    [[3, 1], [0, 2]]
    """
    groups = list[list[int]]()
    for i in sorted(arrivals, key=lambda i: len(prompts[i])):
        tokens = sum(len(prompts[j]) for j in groups[-1]) if groups else 0
        padding = len(prompts[i]) * len(groups[-1]) - tokens if groups else 0
        if groups and padding <= max(256, tokens / 4):  # a call of its own costs about as much as 256 tokens
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _advance(row: _Row, token: int, logprob: float, stop_tokens: Collection[int], tool: Tool | None) -> bool:
    """Give a row its next token, forced or else the sampled one; False when that ends it."""
    sample, forced = row.sample, bool(row.forced)
    sample.tokens.append(row.forced.popleft() if forced else token)
    sample.mask.append(int(not forced))
    sample.logprobs.append(0.0 if forced else logprob)
    if not forced and token in stop_tokens:
        sample.finish_reason = "stop"
        return False
    if tool is not None and not forced:
        try:
            row.forced.extend(tool(sample.tokens))
        except ValueError:
            sample.finish_reason = "tool_error"
            return False
    return len(sample.tokens) < row.limit


def check_request(
    prompts: Sequence[list[int]],
    samples: Sequence[list[Sample]],
    seed: int | Sequence[int],
    context: int,
    vocabulary: int,
) -> None:
    """Refuse what cannot be sampled, with a message that says why."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: the context holds 1 to {context - 1} and an answer")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"prompt {i} has tokens {min(prompt)} to {max(prompt)}: the model knows 0 to {vocabulary - 1}"
            )
    if not all(samples):
        raise ValueError("num_samples=0: ask for at least one")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts: give one each")


@torch.inference_mode()
def generate_naive(model: GPT, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
    """Greedy tokens without a cache: the whole sequence is computed again for each one."""
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for _ in range(max_new_tokens):
        token = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, token[:, None]), dim=1)
        yield int(token)
