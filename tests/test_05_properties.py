"""Chapter 5, for any model, prompts, batch, chunks and stop tokens: what the Engine gives is what the definition gives."""

import gc
from functools import cache

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_04_model import random_gpt

from edu.engine import Engine, KVCache, generate_naive
from edu.model import GPT

VOCABULARY, CONTEXT = 40, 48
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)
seeds = st.integers(0, 2**32 - 1)
quickly = settings(max_examples=25, deadline=None, derandomize=True)


@cache
def model_of(kv_heads: int, layers: int) -> GPT:
    sizes = {"num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    return random_gpt(seed=layers, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes)


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


@quickly
@given(
    model=models,
    batch=st.lists(st.tuples(prompts, seeds), min_size=1, max_size=5),
    samples=st.integers(1, 3),
    rows=st.integers(1, 7),
    stops=st.sets(st.integers(0, 39), max_size=6),
    temperature=st.sampled_from((0.7, 1.0, 1.6)),
)
def test_batched_is_alone_and_forked_is_recomputed(
    model: GPT, batch: list[tuple[list[int], int]], samples: int, rows: int, stops: set[int], temperature: float
) -> None:
    options = {"max_new_tokens": 15, "temperature": temperature, "stop_tokens": tuple(stops)}
    texts, their_seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
    together = Engine(model, rows).generate(texts, samples, seed=their_seeds, **options)
    for prompt, seed, group in zip(texts, their_seeds, together, strict=True):
        assert [s.tokens for s in Engine(model).generate([prompt], samples, seed=seed, **options)[0]] == [
            s.tokens for s in group
        ]
        for sample in group:
            logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
            fresh = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), fresh, atol=1e-4, rtol=0)


@quickly
@given(
    model=models,
    batch=st.lists(prompts, min_size=1, max_size=5),
    samples=st.integers(1, 3),
    rows=st.integers(1, 7),
    calls=st.sets(st.integers(0, 39), min_size=1, max_size=12),
    answer=st.lists(st.integers(0, 39), min_size=1, max_size=4),
)
def test_what_a_tool_forces_is_read_as_any_prompt(
    model: GPT, batch: list[list[int]], samples: int, rows: int, calls: set[int], answer: list[int]
) -> None:
    def tool(tokens: list[int]) -> list[int]:
        return answer if tokens[-1] in calls else []

    seeds = list(range(len(batch)))
    for prompt, group in zip(
        batch, Engine(model, rows).generate(batch, samples, max_new_tokens=15, seed=seeds, tool=tool), strict=True
    ):
        for sample in group:
            mask = list[int]()
            while len(mask) < len(sample.tokens):
                mask.append(1)
                if sample.tokens[len(mask) - 1] in calls:
                    assert (
                        sample.tokens[len(mask) : len(mask) + len(answer)] == answer[: len(sample.tokens) - len(mask)]
                    )
                    mask += [0] * len(answer)
            assert sample.mask == mask[: len(sample.tokens)]
            logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
            fresh = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            expected = fresh * torch.tensor(sample.mask)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


@quickly
@given(model=models, batch=st.lists(prompts, min_size=1, max_size=5), chunk=st.integers(1, 31))
def test_chunks_change_nothing(model: GPT, batch: list[list[int]], chunk: int) -> None:
    engine, width = Engine(model), max(map(len, batch))
    pieces = engine.prefill(batch, KVCache(len(batch), width, model), chunk)
    for prompt, logits in zip(batch, pieces, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0, -1], atol=1e-5, rtol=1e-5)


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
