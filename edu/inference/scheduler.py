"""Continuous batching: requests join and leave a batch of rows between two steps of decoding.

A request is a prompt and K samples of it. Its prompt is computed once (prefill) and its cache row copied for each sample;
then every step gives each row one token. Rows that finish make room for waiting requests. A sample depends on its
request alone: every row has its own random numbers and its own positions, whichever rows are beside it.

B rows, K samples of a prompt, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from edu.inference.decoder import Decoder
from edu.inference.params import Sample, SamplingParams
from edu.inference.sampling import sample_tokens
from edu.model.kv_cache import KVCache

Tool = Callable[[list[int]], list[int]]
"""New tokens so far -> tokens to force, [] for none; raises ValueError to end the sample."""


@dataclass(eq=False)
class Request:
    """A prompt with its samples, which grow with every step."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    tool: Tool | None
    samples: list[Sample]
    running: int
    """Samples that are not finished yet"""


@dataclass(eq=False)
class _Row:
    """One sample being decoded."""

    request: Request
    sample: Sample
    limit: int
    """Maximum number of new tokens"""
    newest: int
    """The token that the next step feeds to the model"""
    random: Callable[[], float]
    """Draws the next uniform number of this row"""
    forced: deque[int] = field(default_factory=deque)
    """Tokens of a tool's answer that are waiting to be appended"""

    def advance(self, token: int, logprob: float) -> bool:
        """Append the next token: a forced one if any is waiting, else the sampled one. Return False when the sample ends."""
        sample, params, forced = self.sample, self.request.params, bool(self.forced)
        self.newest = self.forced.popleft() if forced else token
        sample.tokens.append(self.newest)
        sample.mask.append(int(not forced))
        sample.logprobs.append(0.0 if forced else logprob)
        if not forced and token in params.stop_tokens:
            sample.finish_reason = "stop"
            return False
        if self.request.tool is not None and not forced:
            try:
                self.forced.extend(self.request.tool(sample.tokens))
            except ValueError:
                sample.finish_reason = "tool_error"
                return False
        return len(sample.tokens) < self.limit


class Scheduler:
    """Assign the rows of one cache to requests: `submit` any number, `step` until it returns False, `cancel` at any time."""

    def __init__(self, decoder: Decoder, cache: KVCache, vocab_size: int) -> None:
        self.decoder, self.cache, self.vocab_size = decoder, cache, vocab_size
        self.waiting, self.rows, self.submitted = deque[Request](), list[_Row](), 0

    def submit(
        self, prompt: list[int], params: SamplingParams, num_samples: int = 1, seed: int = 0, tool: Tool | None = None
    ) -> Request:
        """Queue a request; ValueError if it cannot be sampled, with its index in the order of submission."""
        room, name = self.cache.get_max_length(), f"prompt {self.submitted}"
        if not 0 < len(prompt) < room:
            raise ValueError(f"{name} has {len(prompt)} tokens: the context holds 1 to {room - 1} and an answer")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            known = f"the model knows 0 to {self.vocab_size - 1}"
            raise ValueError(f"{name} has tokens {min(prompt)} to {max(prompt)}: {known}")
        if not 0 < num_samples <= self.cache.batch_size:
            raise ValueError(f"num_samples={num_samples}: ask for 1 to {self.cache.batch_size}, the rows of the cache")
        request = Request(prompt, params, seed, tool, [Sample() for _ in range(num_samples)], num_samples)
        self.waiting.append(request)
        self.submitted += 1
        return request

    def cancel(self, request: Request) -> None:
        """Drop a request; its unfinished samples end as they are."""
        if request in self.waiting:
            self.waiting.remove(request)
            ended = request.samples
        else:
            ended = [row.sample for row in self.rows if row.request is request]
            self._keep([row.request is not request for row in self.rows])
        for sample in ended:
            sample.finish_reason = "cancelled"
        request.running = 0

    @torch.inference_mode()
    def step(self) -> bool:
        """Give every row its next token; return False when no request is left.

        1. Admit waiting requests while there are rows for all samples of the next one.
        2. Decode: each row's newest token in, the logits of the token after it out.
        3. Choose each row's next token: forced by its tool, or sampled.
        4. Remove the finished rows.
        """
        self._admit()
        if not self.rows:
            return False
        newest = torch.tensor([row.newest for row in self.rows], device=self.cache.memory.device)
        logits = self.decoder.step(newest, self.cache)  # (B, V)
        tokens, logprobs = self._choose(logits)
        chosen = zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True)
        self._keep([row.advance(token, logprob) for row, token, logprob in chosen])
        return bool(self.rows or self.waiting)

    def _admit(self) -> None:
        """Prefill waiting prompts into free rows, except for each prompt's last token."""
        # The next step feeds that token to all K rows, so every new token, the first included, is drawn in step().
        arrivals, free = list[Request](), self.cache.batch_size - len(self.rows)
        while self.waiting and len(self.waiting[0].samples) <= free:
            arrivals.append(self.waiting.popleft())
            free -= len(arrivals[-1].samples)
        for group in _alike(arrivals):
            first, count = len(self.rows), len(group)
            fresh = self.cache.view_rows(first, first + count)
            self.decoder.prefill([request.prompt[:-1] for request in group], fresh)
            self.cache.lengths[first : first + count] = fresh.lengths
            # Row first + i has prompt i and becomes its sample 0; the other samples are copies of it, in later rows.
            forks = [(i, k) for i, request in enumerate(group) for k in range(1, len(request.samples))]
            copies = range(first + count, first + count + len(forks))
            self.cache.copy_rows(list(copies), [first + i for i, _ in forks])
            self.rows += [self._row(group[i], k) for i, k in [(i, 0) for i in range(count)] + forks]

    def _row(self, request: Request, k: int) -> _Row:
        limit = min(request.params.max_new_tokens, self.cache.get_max_length() - len(request.prompt))
        draws = np.random.default_rng((request.seed, k))  # depends on request and sample alone
        return _Row(request, request.samples[k], limit, request.prompt[-1], draws.random)

    def _choose(self, logits: Float[Tensor, "B V"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """Sample each row's token with its request's settings, all rows of equal settings together."""
        uniforms = torch.tensor([row.random() for row in self.rows], device=logits.device)
        alike = dict[SamplingParams, list[int]]()
        for i, row in enumerate(self.rows):
            alike.setdefault(row.request.params, []).append(i)
        if len(alike) == 1:
            return sample_tokens(logits, uniforms, self.rows[0].request.params)
        tokens, logprobs = uniforms.new_empty(len(uniforms), dtype=torch.long), logits.new_empty(len(uniforms))
        for params, at in alike.items():
            tokens[at], logprobs[at] = sample_tokens(logits[at], uniforms[at], params)
        return tokens, logprobs

    def _keep(self, live: list[bool]) -> None:
        """Remove finished rows; live rows from the end move into the gaps, so that live rows stay first in the cache."""
        for row, is_live in zip(self.rows, live, strict=True):
            if not is_live:
                row.request.running -= 1
        count = sum(live)
        gaps = [i for i in range(count) if not live[i]]
        movers = [i for i in range(count, len(live)) if live[i]]
        self.cache.copy_rows(gaps, movers)
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[count:]
        self.cache.lengths[count:] = [0] * (self.cache.batch_size - count)


def _alike(requests: Sequence[Request]) -> list[list[Request]]:
    """Group requests by the length of their prompts, so that padding a group costs little."""
    groups = list[list[Request]]()
    for request in sorted(requests, key=lambda request: len(request.prompt)):
        tokens = sum(len(other.prompt) for other in groups[-1]) if groups else 0
        padding = len(request.prompt) * len(groups[-1]) - tokens if groups else 0
        if groups and padding <= max(256, tokens / 4):  # a call of its own costs about as much as 256 tokens
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups
