"""Chapter 5: the cache and the engine, against the uncached loop."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from test_04_model import random_gpt
from torch.utils._python_dispatch import TorchDispatchMode

from edu.fast.cpu_decoder import Decoder
from edu.inference.engine import Engine, KVCache, generate_naive
from edu.inference.params import SamplingParams
from edu.inference.sampling import sample_tokens
from edu.model.gpt import GPT

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]]


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt(vocab_size=50, seed=3)


def test_cached_decode_equals_full_forward(model: GPT) -> None:
    out = Engine(model).generate(PROMPTS, max_new_tokens=30, temperature=0)
    for prompt, (sample,) in zip(PROMPTS, out, strict=True):
        assert sample.tokens == list(generate_naive(model, prompt, 30))
        assert len(set(sample.tokens)) > 3, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("max_rows", [4, 6, 11])
def test_a_sample_does_not_depend_on_its_batch(model: GPT, max_rows: int) -> None:
    options = {"max_new_tokens": 25, "stop_tokens": (7, 8, 9, 10), "temperature": 1.5}
    together = Engine(model, max_rows).generate(PROMPTS, 4, seed=[5, 6, 7, 8], **options)
    for prompt, seed, samples in zip(PROMPTS, (5, 6, 7, 8), together, strict=True):
        alone = Engine(model).generate([prompt], 4, seed=seed, **options)[0]
        assert [s.tokens for s in alone] == [s.tokens for s in samples]
    assert len({tuple(s.tokens) for samples in together for s in samples}) == 16


def test_log_probabilities_are_those_of_a_fresh_forward_pass(model: GPT) -> None:
    for prompt, samples in zip(PROMPTS, Engine(model).generate(PROMPTS, 3, max_new_tokens=20), strict=True):
        for sample in samples:
            logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def test_a_stop_token_ends_a_sample_and_is_kept(model: GPT) -> None:
    greedy = Engine(model).generate(PROMPTS[:1], max_new_tokens=30, temperature=0)[0][0].tokens
    stop = greedy[5]
    sample = Engine(model).generate(PROMPTS[:1], max_new_tokens=30, temperature=0, stop_tokens=[stop])[0][0]
    assert sample.finish_reason == "stop"
    assert sample.tokens == greedy[: greedy.index(stop) + 1]


def test_the_context_is_never_exceeded(model: GPT) -> None:
    context = model.config.max_position_embeddings
    sample = Engine(model).generate([[1] * (context - 5)], max_new_tokens=50)[0][0]
    assert (len(sample.tokens), sample.finish_reason) == (5, "length")
    with pytest.raises(ValueError, match=f"prompt 0 has {context} tokens"):
        Engine(model).generate([[1] * context], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        Engine(model).generate([[1], []], max_new_tokens=1)


def test_a_tool_forces_tokens_that_are_masked_and_seen(model: GPT) -> None:
    first = Engine(model).generate(PROMPTS[:1], max_new_tokens=12, temperature=0)[0][0].tokens

    def tool(tokens: list[int]) -> list[int]:
        return [41, 42, 43] if len(tokens) == 3 else []

    sample = Engine(model).generate(PROMPTS[:1], max_new_tokens=12, temperature=0, tool=tool)[0][0]
    assert sample.tokens[:6] == [*first[:3], 41, 42, 43]
    assert sample.mask == [1, 1, 1, 0, 0, 0] + [1] * 6
    assert sample.logprobs[3:6] == [0, 0, 0]
    assert sample.tokens[6:] == list(generate_naive(model, PROMPTS[0] + sample.tokens[:6], 6))


def test_a_tool_that_refuses_ends_its_sample_only(model: GPT) -> None:
    def tool(tokens: list[int]) -> list[int]:
        if len(tokens) == 2 and tokens[0] % 2:
            raise ValueError("no")
        return []

    samples = Engine(model).generate(PROMPTS[:1], 8, max_new_tokens=6, tool=tool)[0]
    assert Counter(s.finish_reason for s in samples).keys() == {"tool_error", "length"}
    assert all(len(s.tokens) == (2 if s.finish_reason == "tool_error" else 6) for s in samples)


def test_streaming_gives_the_same_tokens_each_at_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[int]()

    def watched(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(len(logits))
        return sample_tokens(logits, *args)

    monkeypatch.setattr("edu.inference.engine.sample_tokens", watched)
    stream = Engine(model).stream(PROMPTS[1], max_new_tokens=15, seed=4)
    streamed = [next(stream)]
    assert len(steps) == 1, "a token is there before the next is computed"
    streamed += stream
    assert streamed == Engine(model).generate([PROMPTS[1]], max_new_tokens=15, seed=4)[0][0].tokens


def test_finished_rows_cost_nothing_and_waiting_prompts_take_their_place(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, arrivals, prefill = list[int](), list[int](), Engine.prefill

    def watched_sampling(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(logits))
        return sample_tokens(logits, *args)

    def watched_prefill(self: Engine, *args: Any) -> torch.Tensor:
        arrivals.append(len(rows))
        return prefill(self, *args)

    monkeypatch.setattr("edu.inference.engine.sample_tokens", watched_sampling)
    monkeypatch.setattr(Engine, "prefill", watched_prefill)
    groups = Engine(model, max_rows=5).generate(PROMPTS * 5, 2, max_new_tokens=20, stop_tokens=range(8), seed=range(20))
    lengths = [len(sample.tokens) for group in groups for sample in group]
    assert len(set(lengths)) > 5
    assert sum(rows) == sum(lengths), "every row of every step gives a token of a sample"
    assert max(rows) <= 5
    assert all(n >= 4 for n in rows[: arrivals[-1]]), "a prompt of two samples waits while fewer than two rows are free"


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """In standard deviations above its mean: over 4 is a chance of one in thousands."""
    freedom = observed.numel() - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_samples_of_a_group_draw_their_first_tokens_independently_from_the_model() -> None:
    model, n = random_gpt(vocab_size=12, seed=5), 6000
    groups = Engine(model).generate(PROMPTS[2:3] * 2, n, max_new_tokens=1, temperature=2.0, seed=[7, 8])
    first, other = (torch.tensor([sample.tokens[0] for sample in group]) for group in groups)
    with torch.no_grad():
        probs = (model(torch.tensor(PROMPTS[2:3])).logits[0, -1] / 2).softmax(-1)
    assert probs.min() > 0.005
    assert probs.max() < 0.3
    assert chi_square(first.bincount(minlength=12), n * probs) < 4
    pairs = {"neighbours": (first[:-1], first[1:]), "seeds": (first, other), "seed + 1": (first[1:], other[:-1])}
    for name, (a, b) in pairs.items():
        counts = (12 * a + b).bincount(minlength=144)
        assert chi_square(counts, len(a) * torch.outer(probs, probs).flatten()) < 4, name


def test_sampled_frequencies_are_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    n = 20_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(probs.log().expand(n, -1), uniforms, SamplingParams())
    counts = tokens.bincount(minlength=5)
    chi_square = float(((counts - n * probs) ** 2 / (n * probs)).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs.exp(), probs[tokens])


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 0.5}, {0}), ({"min_p": 0.25}, {0, 1, 2})],
)
def test_truncations_keep_what_they_say(options: dict[str, float], kept: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]])).expand(500, -1)
    tokens, logprobs = sample_tokens(logits, torch.linspace(0, 0.9999, 500), SamplingParams(**options))
    assert set(tokens.tolist()) == kept
    by_token = dict(zip(tokens.tolist(), logprobs.exp().tolist(), strict=True))
    assert sum(by_token.values()) == pytest.approx(1, abs=1e-5), "log-probabilities are of the truncated distribution"


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-24, 2), (1.0, 2)])
def test_the_least_and_the_greatest_number_never_give_an_impossible_token(u: float, token: int) -> None:
    """A draw just below 1 is 1 in fp32."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([u]), SamplingParams())
    assert tokens.item() == token
    assert logprobs.item() == pytest.approx(math.log(0.5))


def test_top_p_keeps_what_a_sort_of_the_whole_vocabulary_keeps() -> None:
    """Rows whose few most probable tokens reach top_p, and rows where it takes most of a large vocabulary."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 8, 8)[:, None]
    probs = logits.double().softmax(-1)
    uniforms = torch.linspace(0, 0.999, 8)
    for rows in (slice(0, 8), slice(6, 8)):
        tokens, logprobs = sample_tokens(logits[rows], uniforms[rows], SamplingParams(top_p=0.8))
        drawn = probs[rows].gather(1, tokens[:, None])
        ranked = probs[rows].sort(descending=True).values
        cumulative = ranked.cumsum(1)
        last = (cumulative < 0.8).sum(1, keepdim=True)
        assert (last > 1000).any() == (rows.start == 0)
        kept = drawn / logprobs.double().exp()[:, None]  # the probability of all tokens that could be drawn
        torch.testing.assert_close(kept, cumulative.gather(1, last), atol=1e-6, rtol=1e-5)
        assert (drawn >= ranked.gather(1, last)).all(), "none is less probable than the last that is kept"


def test_cache_has_the_logical_shape_and_takes_ragged_positions(model: GPT) -> None:
    cache = KVCache(3, 10, model)
    assert cache.tensor.shape == (3, 2, 2, 2, 10, 16)
    k = torch.randn(3, 2, 1, 16)
    positions = torch.tensor([[0], [4], [9]])
    cache.insert_kv(1, torch.stack((k, -k), 1), positions)
    for row, at in enumerate(positions.flatten().tolist()):
        assert torch.equal(cache.tensor[row, 1, 0, :, at], k[row, :, 0])
        assert torch.equal(cache.tensor[row, 1, 1, :, at], -k[row, :, 0])
    assert cache.tensor.count_nonzero() == 2 * k.numel()
    wide = KVCache(3, 10, random_gpt(num_attention_heads=8, num_key_value_heads=8))
    narrow = KVCache(3, 10, random_gpt(num_attention_heads=8, num_key_value_heads=2))
    assert wide.tensor.numel() == 4 * narrow.tensor.numel(), "a quarter of the heads takes a quarter of the memory"


def test_prompts_of_very_different_lengths_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_gpt(vocab_size=50, max_position_embeddings=1024)
    widths = list[int]()
    extend = Decoder.extend

    def watched(self: Decoder, tokens: torch.Tensor, lengths: list[int], cache: KVCache) -> torch.Tensor:
        widths.extend([tokens.shape[1]] * len(tokens) if tokens.shape[1] > 1 else [])
        return extend(self, tokens, lengths, cache)

    monkeypatch.setattr(Decoder, "extend", watched)
    prompts = [[1 + i % 7] * (600 if i in (3, 5) else 4 + i) for i in range(8)]
    together = Engine(model).generate(prompts, 3, max_new_tokens=5, temperature=0)
    assert sorted(widths) == [11] * 6 + [600] * 2, "a prompt is computed once for all of its samples"
    for prompt, group in zip(prompts, together, strict=True):
        (alone,) = Engine(model).generate([prompt], max_new_tokens=5, temperature=0)[0]
        assert [sample.tokens for sample in group] == [alone.tokens] * 3


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prompts_computed_in_pieces_give_the_same_logits(model: GPT, chunk: int) -> None:
    engine, caches = Engine(model), [KVCache(4, 20, model) for _ in range(2)]
    whole = engine.prefill(PROMPTS, caches[0])
    torch.testing.assert_close(engine.prefill(PROMPTS, caches[1], chunk), whole, atol=1e-5, rtol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        a, b = (cache.tensor[row, :, :, :, : len(prompt)] for cache in caches)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[3, 9, 2, 16], [9, 9], [7]], ids=["ragged", "even", "alone"])
@pytest.mark.parametrize(
    ("dtype", "threads", "tolerance"),
    [(torch.float32, 1, 1e-5), (torch.float32, 3, 1e-5), (torch.float64, 1, 1e-12)],
    ids=["loops", "loops on several threads, packed weights", "operators"],
)
def test_the_decoder_computes_what_the_model_does(
    kv_heads: int,
    lengths: list[int],
    dtype: torch.dtype,
    threads: int,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("edu.fast.cpu_decoder.FROM_CACHE", 0)
    monkeypatch.setattr("edu.fast.cpu_kernels.PART", 1)
    # An epsilon so large that none can be left out.
    model = random_gpt(vocab_size=50, num_key_value_heads=kv_heads, rms_norm_eps=0.1).to(dtype)
    prompts = [PROMPTS[3][:length] for length in lengths]
    cache, decoder = KVCache(len(prompts), 20, model), Decoder(model)
    Engine(model).prefill(prompts, cache)
    for step, token in enumerate((4, 41, 7)):
        logits = decoder.step(torch.tensor([token] * len(prompts)), [length + step for length in lengths], cache)
        prompts = [[*prompt, token] for prompt in prompts]
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


def test_the_engine_follows_its_model() -> None:
    model = random_gpt(vocab_size=50)
    engine = Engine(model)
    before = engine.generate(PROMPTS, max_new_tokens=12, temperature=0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = engine.generate(PROMPTS, max_new_tokens=12, temperature=0)
    assert after != before
    assert after == Engine(model).generate(PROMPTS, max_new_tokens=12, temperature=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_decode_too(dtype: torch.dtype) -> None:
    model = random_gpt(vocab_size=50).to(dtype)
    samples = Engine(model).generate(PROMPTS, 2, max_new_tokens=8)
    assert all(len(sample.tokens) == 8 for group in samples for sample in group)
    naive = list(generate_naive(model, PROMPTS[1], 8))
    greedy = Engine(model).generate(PROMPTS[1:2], max_new_tokens=8, temperature=0)[0][0].tokens
    assert greedy[0] == naive[0]
    assert dtype != torch.float64 or greedy == naive
    cache = KVCache(1, 20, model)
    Engine(model).prefill(PROMPTS[1:2], cache)
    logits = Decoder(model).step(torch.tensor([4]), [len(PROMPTS[1])], cache)
    expected = model(torch.tensor([[*PROMPTS[1], 4]])).logits[:, -1]
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cache.tensor.element_size() == torch.empty((), dtype=dtype).element_size()
    # What one rounding in two places of the same layer may do to logits of this size.
    torch.testing.assert_close(logits, expected.to(logits.dtype), atol=8 * torch.finfo(dtype).eps * 4, rtol=0)


def test_bad_requests_are_named(model: GPT) -> None:
    engine = Engine(model)
    with pytest.raises(ValueError, match=r"temperature=-1"):
        engine.generate([[1]], max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match=r"top_p=0"):
        engine.generate([[1]], max_new_tokens=1, top_p=0)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        engine.generate([[1]], max_new_tokens=1, seed=[1, 2])
    with pytest.raises(ValueError, match="prompt 1 has tokens -1 to 50: the model knows 0 to 49"):
        engine.generate([[1], [50, -1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(TypeError, match="top_q"):
        engine.generate([[1]], top_q=0.5)
    with pytest.raises(ValueError, match="num_samples=0"):
        engine.generate([[1]], 0, max_new_tokens=1)


def test_apples_gpus_have_every_operator_that_is_used_and_neither_complex_nor_double_numbers() -> None:
    """No such machine is at hand: torch's own table of kernels says what it has."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {
        entry["func"].partition("(")[0]: entry
        for entry in yaml.load(table.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    }
    used, dtypes = set[str](), set[torch.dtype]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is NotImplemented:
                used.add(func._schema.name.removeprefix("aten::") + f".{func._schema.overload_name}".rstrip("."))
                out = func(*args, **(kwargs or {}))
            dtypes.update(x.dtype for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    model = random_gpt(vocab_size=50).bfloat16()  # fp32 takes oneDNN's products, which are a CPU's
    with Watch():
        engine = Engine(model, max_rows=3)
        for how in ({}, {"temperature": 0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}):
            engine.generate(PROMPTS, 2, max_new_tokens=5, **how)
        engine.prefill(PROMPTS, KVCache(4, 20, model), 5)
    attention = {"_scaled_dot_product_flash_attention_for_cpu"}  # elsewhere torch takes the machine's own
    assert {"_softmax", "roll", *attention} <= used
    general = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
    for name in used - attention:
        entry = entries[entries[name].get("structured_delegate", name)]
        backends = {backend.strip() for some in entry.get("dispatch", {}) for backend in some.split(",")}
        assert not backends or backends & {"MPS", *general}, name
    assert not any(dtype.is_complex or dtype == torch.float64 for dtype in dtypes)
