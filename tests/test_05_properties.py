"""Chapter 5, for any model, prompts, batch, chunks and stop tokens: what the Engine gives is what the definition gives."""

import copy
import gc
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_04_model import random_gpt

from edu.inference.decoder import decoder_for
from edu.inference.engine import Engine, KVCache, generate_naive
from edu.inference.params import Sample, SamplingParams
from edu.inference.sampling import sample_tokens
from edu.model.gpt import GPT

VOCABULARY, CONTEXT = 40, 48
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
seeds = st.integers(0, 2**32 - 1)
quickly = settings(max_examples=25, deadline=None, derandomize=True)


@cache
def model_of(kv_heads: int, layers: int) -> GPT:
    sizes = {"num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    return random_gpt(seed=layers, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes)


@cache
def in_fp64(model: GPT) -> GPT:
    return copy.deepcopy(model).double()


@pytest.fixture(autouse=True, scope="module", params=["fast", "readable"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDU_FAST", str(int(request.param == "fast")))
        yield


models = st.builds(model_of, st.sampled_from((1, 2, 4)), st.integers(1, 3))


@quickly
@given(model=models, batch=st.lists(prompts, min_size=1, max_size=6), stops=st.sets(st.integers(0, 39), max_size=6))
def test_cached_is_uncached(model: GPT, batch: list[list[int]], stops: set[int]) -> None:
    groups = Engine(model, max_rows=3).generate(batch, max_new_tokens=12, temperature=0, stop_tokens=tuple(stops))
    for prompt, (sample,) in zip(batch, groups, strict=True):
        expected = list(generate_naive(model, prompt, 12))
        ends = [i for i, token in enumerate(expected) if token in stops]
        assert sample.tokens == (expected[: ends[0] + 1] if ends else expected)
        assert sample.finish_reason == ("stop" if ends else "length")


TIE = 1e-5
"""Products of one row and of several, and of rows of other lengths, differ in their last bits. A choice within TIE of the
boundary between two tokens may therefore fall to either side: there, and only there, a batch may change a token."""

requests = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from((0, 0.7, 1.0, 1.6)),
        "top_k": st.none() | st.integers(1, VOCABULARY + 5),
        "top_p": st.none() | st.floats(0.05, 0.95),
        "min_p": st.none() | st.floats(0.01, 0.9),
    }
)
few_tokens = st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6)


@dataclass(frozen=True)
class Calculator:
    """A tool: after some tokens it answers, after others it refuses."""

    calls: frozenset[int]
    refuses: frozenset[int]
    answer: list[int]

    def __call__(self, tokens: list[int]) -> list[int]:
        if tokens[-1] in self.refuses:
            raise ValueError("no")
        return self.answer if tokens[-1] in self.calls else []


tools = st.none() | st.builds(Calculator, few_tokens, few_tokens, st.lists(st.integers(0, 39), min_size=1, max_size=4))


def choose(
    logits: np.ndarray, u: float, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[int, float, float]:
    """The definition, in fp64: the token, its log-probability, and how far the choice was from being another one."""

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z - z.max()) / np.exp(z - z.max()).sum()

    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return int(order[0]), float(np.log(softmax(logits)[order[0]])), logits[order[0]] - logits[order[1]]
    z, kept, margins = logits[order] / temperature, len(order), list[float]()
    if top_k is not None and top_k < kept:
        kept = top_k
        margins.append(z[kept - 1] - z[kept])
    if min_p is not None:
        above = z - z[0] - np.log(min_p)
        kept = min(kept, int((above >= 0).sum()))
        margins.append(abs(above).min())
    if top_p is not None:
        before = np.append(0, softmax(z[:kept]).cumsum())
        kept = int((before[:-1] < top_p).sum())
        margins.append(abs(before - top_p).min())
    ids = np.sort(order[:kept])
    probs = softmax(logits[ids] / temperature)
    cumulative = probs.cumsum()
    place = min(int(np.searchsorted(cumulative, u, side="right")), kept - 1)
    margins.append(abs(cumulative[:-1] - u).min(initial=1))
    return int(ids[place]), float(np.log(probs[place])), min(margins)


def replay(
    logits: np.ndarray, sample: Sample, draws: Iterator[float], stops: frozenset[int], tool: Any, limit: int, **how: Any
) -> int:
    """Assert that a sample is what the definition gives after its own tokens; how many of them lie before the first tie."""
    forced, certain, finish = deque[int](), len(sample.tokens), ""
    for i, (token, u) in enumerate(zip(sample.tokens, draws, strict=False)):
        assert not finish, "nothing follows an end"
        assert sample.mask[i] == int(not forced)
        if forced:
            assert (token, sample.logprobs[i]) == (forced.popleft(), 0.0)
        else:
            best, logprob, margin = choose(logits[i], u, **how)
            if margin > TIE:
                assert token == best
                assert abs(sample.logprobs[i] - logprob) < 1e-4
            certain = min(certain, i) if margin <= TIE else certain
            if token in stops:
                finish = "stop"
            elif tool is not None:
                try:
                    forced.extend(tool(sample.tokens[: i + 1]))
                except ValueError:
                    finish = "tool_error"
        finish = finish or ("length" if i + 1 == limit else "")
    assert sample.finish_reason == finish
    assert limit >= len(sample.tokens) == len(sample.mask) == len(sample.logprobs)
    return certain


def run(
    model: GPT, rows: int, chunk: int, *args: Any, **options: Any
) -> tuple[list[list[Sample]], dict[float, list[torch.Tensor]]]:
    """What an Engine of so many rows and so large chunks gives, and the logits that each uniform number met."""
    engine, met = Engine(model, rows), defaultdict[float, list[torch.Tensor]](list)

    def watched(
        logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for u, row in zip(uniforms.tolist(), logits, strict=True):
            met[u].append(row)
        return sample_tokens(logits, uniforms, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edu.inference.scheduler.sample_tokens", watched)
        patch.setattr("edu.inference.decoder.PREFILL_CHUNK", chunk)
        return engine.generate(*args, **options), met


@settings(quickly, max_examples=60)
@given(
    model=models,
    batch=st.lists(st.tuples(prompts, seeds), min_size=1, max_size=5),
    samples=st.integers(1, 3),
    rows=st.integers(1, 7),
    chunks=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    new=st.integers(1, 25),
    how=requests,
    stops=few_tokens,
    tool=tools,
)
def test_batched_is_alone_and_both_are_the_definition(
    model: GPT,
    batch: list[tuple[list[int], int]],
    samples: int,
    rows: int,
    chunks: tuple[int, int],
    new: int,
    how: dict[str, Any],
    stops: frozenset[int],
    tool: Calculator | None,
) -> None:
    """Tokens, masks, log-probabilities, finish reasons, and the logits of every step, whatever batch, slot and chunks."""
    options = {"max_new_tokens": new, "stop_tokens": tuple(stops), "tool": tool, **how}
    their_prompts, their_seeds = zip(*batch, strict=True)
    together, met = run(model, rows, chunks[0], their_prompts, samples, seed=their_seeds, **options)
    for prompt, seed, group in zip(their_prompts, their_seeds, together, strict=True):
        (alone,), met_alone = run(model, 128, chunks[1], [prompt], samples, seed=seed, **options)
        limit = min(new, CONTEXT - len(prompt))
        for k, pair in enumerate(zip(group, alone, strict=True)):
            certain = []
            for sample, logits_of in zip(pair, (met, met_alone), strict=True):
                with torch.no_grad():
                    exact = in_fp64(model)(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
                uniforms = np.random.default_rng((seed, k)).random(limit)
                for u, row in zip(uniforms, exact.float(), strict=False):
                    # (Should two samples meet the same number, one of them met these logits.)
                    assert any(torch.allclose(x, row, atol=1e-5, rtol=1e-5) for x in logits_of[float(np.float32(u))])
                certain.append(replay(exact.numpy(), sample, iter(uniforms), stops, tool, limit, **how))
            shared = min(certain)
            assert pair[0].tokens[:shared] == pair[1].tokens[:shared]
            if shared == len(pair[0].tokens):
                assert (pair[0].mask, pair[0].finish_reason) == (pair[1].mask, pair[1].finish_reason)
                assert pair[0].logprobs == pytest.approx(pair[1].logprobs, abs=1e-4)


@quickly
@given(model=models, batch=st.lists(prompts, min_size=1, max_size=5), chunk=st.integers(1, 31))
def test_chunks_change_nothing(model: GPT, batch: list[list[int]], chunk: int) -> None:
    cache = KVCache(len(batch), max(map(len, batch)) + 1, model)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("edu.inference.decoder.PREFILL_CHUNK", chunk)
        decoder = decoder_for(model)
        decoder.prefill(batch, cache)
        pieces = decoder.step(torch.full((len(batch),), 7), cache)
    for prompt, logits in zip(batch, pieces, strict=True):
        expected = model(torch.tensor([[*prompt, 7]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_ten_thousand_requests_leak_no_row_and_no_memory() -> None:
    model, process = model_of(2, 2), psutil.Process()
    engine, generator = Engine(model, max_rows=32), torch.Generator().manual_seed(0)
    resident = []
    for turn in range(100):
        lengths = torch.randint(1, CONTEXT, (100,), generator=generator).tolist()
        batch = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        groups = engine.generate(batch, max_new_tokens=CONTEXT, stop_tokens=(3, 4), seed=turn)
        for prompt, (sample,) in zip(batch, groups, strict=True):
            stopped = sample.tokens[-1] in (3, 4)
            assert sample.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(prompt) + len(sample.tokens) == CONTEXT
        gc.collect()
        resident.append(process.memory_info().rss)
    assert max(resident[50:]) < max(resident[:50]) + 4 * 2**20
