"""Chapter 5: the cache and the engine, against the uncached loop."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from test_04_model import random_gpt
from torch.utils._python_dispatch import TorchDispatchMode

from edu.inference.decoder import Decoder, ModelDecoder, decoder_for
from edu.inference.engine import Engine, KVCache, generate_cached, generate_naive
from edu.inference.params import SamplingParams
from edu.inference.sampling import sample_tokens
from edu.inference.scheduler import Scheduler
from edu.model.gpt import GPT
from edu.training.optimizer import make_optimizer

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [9, 7], [9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]]


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt(vocab_size=50, seed=3)


@pytest.fixture(autouse=True, params=["fast", "readable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every law holds for the model itself, and for the faster decoder that is taken where it can be."""
    monkeypatch.setenv("EDU_FAST", str(int(request.param == "fast")))
    return request.param


def test_the_simple_cached_loop_gives_the_tokens_of_the_definition(model: GPT) -> None:
    for prompt in PROMPTS:
        assert list(generate_cached(model, prompt, 30)) == list(generate_naive(model, prompt, 30))


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

    monkeypatch.setattr("edu.inference.scheduler.sample_tokens", watched)
    stream = Engine(model).stream(PROMPTS[1], max_new_tokens=15, seed=4)
    streamed = [next(stream)]
    assert len(steps) == 1, "a token is there before the next is computed"
    streamed += stream
    assert streamed == Engine(model).generate([PROMPTS[1]], max_new_tokens=15, seed=4)[0][0].tokens


def test_finished_rows_cost_nothing_and_waiting_prompts_take_their_place(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, arrivals, prefill = list[int](), list[int](), type(decoder_for(model)).prefill

    def watched_sampling(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(logits))
        return sample_tokens(logits, *args)

    def watched_prefill(self: Any, *args: Any) -> None:
        arrivals.append(len(rows))
        prefill(self, *args)

    monkeypatch.setattr("edu.inference.scheduler.sample_tokens", watched_sampling)
    monkeypatch.setattr(type(decoder_for(model)), "prefill", watched_prefill)
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
    cache, lengths = KVCache(3, 10, model), [0, 4, 9]
    assert cache.tensor.shape == (3, 2, 2, 2, 10, 16)
    cache.lengths = list(lengths)
    k = torch.randn(2, 3, 2, 1, 16)
    for layer in range(2):
        keys, values = cache.insert_kv(layer, k[layer], -k[layer])
        assert keys.shape == values.shape == (3, 2, 10, 16)
        for row, at in enumerate(lengths):
            assert torch.equal(keys[row, :, at], cache.tensor[row, layer, 0, :, at])
            assert torch.equal(cache.tensor[row, layer, 0, :, at], k[layer, row, :, 0])
            assert torch.equal(cache.tensor[row, layer, 1, :, at], -k[layer, row, :, 0])
    assert cache.lengths == [1, 5, 10]
    assert cache.tensor.count_nonzero() == 2 * k.numel()
    wide = KVCache(3, 10, random_gpt(num_attention_heads=8, num_key_value_heads=8))
    narrow = KVCache(3, 10, random_gpt(num_attention_heads=8, num_key_value_heads=2))
    assert wide.tensor.numel() == 4 * narrow.tensor.numel(), "a quarter of the heads takes a quarter of the memory"


def test_prompts_of_very_different_lengths_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_gpt(vocab_size=50, max_position_embeddings=1024)
    widths, decoder = list[int](), type(decoder_for(model))
    prefill = decoder.prefill

    def watched(self: Any, prompts: list[list[int]], cache: KVCache) -> None:
        widths.extend([max(map(len, prompts))] * len(prompts))
        prefill(self, prompts, cache)

    monkeypatch.setattr(decoder, "prefill", watched)
    prompts = [[1 + i % 7] * (600 if i in (3, 5) else 4 + i) for i in range(8)]
    together = Engine(model).generate(prompts, 3, max_new_tokens=5, temperature=0)
    assert sorted(widths) == [10] * 6 + [599] * 2, "a prompt is computed once for all of its samples"
    for prompt, group in zip(prompts, together, strict=True):
        (alone,) = Engine(model).generate([prompt], max_new_tokens=5, temperature=0)[0]
        assert [sample.tokens for sample in group] == [alone.tokens] * 3


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prompts_computed_in_pieces_give_the_same_cache(
    model: GPT, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = KVCache(4, 20, model), KVCache(4, 20, model)
    decoder = decoder_for(model)
    decoder.prefill(PROMPTS, whole)
    monkeypatch.setattr("edu.inference.decoder.PREFILL_CHUNK", chunk)
    decoder.prefill(PROMPTS, pieces)
    assert whole.lengths == pieces.lengths == [len(prompt) for prompt in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        a, b = (cache.tensor[row, :, :, :, : len(prompt)] for cache in (whole, pieces))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def decoded(decoder: Decoder, model: GPT, prompts: list[list[int]], new: tuple[int, ...] = (4, 41, 7)) -> torch.Tensor:
    """The logits after each new token, the same for all rows: (steps, B, V)."""
    cache = KVCache(len(prompts), 24, model)
    with torch.inference_mode():
        decoder.prefill(prompts, cache)
        return torch.stack([decoder.step(torch.tensor([token] * len(prompts)), cache) for token in new])


@pytest.mark.parametrize("lengths", [[3, 9, 2, 16], [9, 9], [7]], ids=["ragged", "even", "alone"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5), ("sdpa", torch.float64, 1e-12)],
)
def test_rows_of_any_lengths_are_computed_as_if_alone(
    lengths: list[int], attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    # An epsilon so large that none can be left out.
    model = random_gpt(vocab_size=50, rms_norm_eps=0.1).to(dtype)
    model.set_attn_implementation(attention)
    prompts = [PROMPTS[3][:length] for length in lengths]
    with torch.no_grad():
        for logits, tokens in zip(decoded(decoder_for(model), model, prompts), ([4], [4, 41], [4, 41, 7]), strict=True):
            expected = [model(torch.tensor([prompt + tokens])).logits[0, -1] for prompt in prompts]
            torch.testing.assert_close(logits, torch.stack(expected), atol=tolerance, rtol=tolerance)


def test_a_subclass_its_hooks_and_its_attention_are_what_is_sampled_from(model: GPT) -> None:
    class Reversed(GPT):
        def forward(self, *args: Any, **options: Any) -> Any:
            outputs = super().forward(*args, **options)
            outputs.logits = outputs.logits.flip(-1)
            return outputs

    changed = Reversed(model.config).eval()
    changed.load_state_dict(model.state_dict())
    hooked, patched = copy.deepcopy(model), copy.deepcopy(model)
    hooked.model.layers[0].mlp.register_forward_hook(lambda _, __, y: 2 * y)
    attention: Any = patched.model.layers[1].self_attn
    attention.forward = partial(attention.forward, packed=False)
    for other in (changed, hooked, patched):
        assert type(decoder_for(other)) is ModelDecoder
        found = [s.tokens for (s,) in Engine(other).generate(PROMPTS, max_new_tokens=12, temperature=0)]
        assert found == [list(generate_naive(other, prompt, 12)) for prompt in PROMPTS]
    assert list(generate_naive(changed, PROMPTS[0], 12)) != list(generate_naive(model, PROMPTS[0], 12))


def test_requests_with_settings_of_their_own_join_and_leave(model: GPT) -> None:
    """Each gives what it gives alone: settings, seed, stop tokens and tool are the request's, whenever it comes."""
    asked = [
        (PROMPTS[0], SamplingParams(20, 0), 2, 1, None),
        (PROMPTS[1], SamplingParams(9, 1.3, top_k=20), 1, 2, None),
        (PROMPTS[2], SamplingParams(30, 1.0, top_p=0.8, stop_tokens=range(9)), 3, 3, None),
        (PROMPTS[3], SamplingParams(12, 0.7, min_p=0.05), 1, 4, lambda tokens: [41, 42] * (len(tokens) == 3)),
    ]
    scheduler, requests = Engine(model).scheduler(4, 64), []
    for turn in range(60):
        if turn % 3 == 0 and asked[len(requests) :]:
            requests.append(scheduler.submit(*asked[len(requests)]))
        assert len(scheduler.rows) <= 4
        scheduler.step()
    assert not scheduler.step()
    for request, (prompt, params, count, seed, tool) in zip(requests, asked, strict=True):
        (alone,) = Engine(model).generate([prompt], count, params, seed=seed, tool=tool)
        assert [s.tokens for s in request.samples] == [s.tokens for s in alone]
        assert [s.finish_reason for s in request.samples] == [s.finish_reason for s in alone]
        assert request.running == 0


def test_a_cancelled_request_frees_its_rows_and_disturbs_nobody(model: GPT) -> None:
    params = SamplingParams(20)
    scheduler: Scheduler = Engine(model).scheduler(4, 64)
    first, second, third = (scheduler.submit(prompt, params, 2, seed=i) for i, prompt in enumerate(PROMPTS[:3]))
    for _ in range(5):
        scheduler.step()
    scheduler.cancel(first)
    assert [row.request for row in scheduler.rows] == [second, second]
    assert [(len(s.tokens), s.finish_reason) for s in first.samples] == [(5, "cancelled")] * 2
    scheduler.step()
    assert len(scheduler.rows) == 4, "the third, which waited, has the rows now"
    fourth = scheduler.submit(PROMPTS[3], params)
    scheduler.cancel(fourth)
    while scheduler.step():
        pass
    assert fourth.samples[0].tokens == []
    for i, request in ((1, second), (2, third)):
        (alone,) = Engine(model).generate([PROMPTS[i]], 2, params, seed=i)
        assert [s.tokens for s in request.samples] == [s.tokens for s in alone]


def fused_adamw(model: GPT) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    optimizer.step()


def our_muon(model: GPT) -> None:
    optimizer = make_optimizer(model, matrix_lr=0.3, embedding_lr=0.3, head_lr=0.3, weight_decay=0.0)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    optimizer.step()


def write_to_data(model: GPT) -> None:
    for p in model.parameters():
        p.data.copy_(p.data.flip(0))


def flip_the_head(model: GPT) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def change_one_number(model: GPT) -> None:
    model.model.layers[1].mlp.fc2.weight.data[3, 5] += 30


def load_other_weights(model: GPT) -> None:
    other = random_gpt(vocab_size=50, seed=9).to(model.dtype)
    model.load_state_dict(other.state_dict(), assign=True)


CHANGES = [fused_adamw, our_muon, write_to_data, flip_the_head, change_one_number, load_other_weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_engine_never_answers_from_old_weights(change: Callable[[GPT], None], dtype: torch.dtype) -> None:
    model = random_gpt(vocab_size=50).to(dtype)
    engine, options = Engine(model), {"max_new_tokens": 12, "temperature": 0}
    before = engine.generate(PROMPTS, **options)
    change(model)
    after = engine.generate(PROMPTS, **options)
    assert after == Engine(model).generate(PROMPTS, **options), "a kept Engine equals a new one"
    assert [s.logprobs for (s,) in after] != [s.logprobs for (s,) in before], "the change shows"


def test_a_model_made_in_inference_mode_is_sampled_from() -> None:
    with torch.inference_mode():
        model = random_gpt(vocab_size=50)
    (sample,) = Engine(model).generate(PROMPTS[:1], max_new_tokens=8, temperature=0)[0]
    assert sample.tokens == list(generate_naive(model, PROMPTS[0], 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_decode_too(dtype: torch.dtype) -> None:
    model = random_gpt(vocab_size=50).to(dtype)
    samples = Engine(model).generate(PROMPTS, 2, max_new_tokens=8)
    assert all(len(sample.tokens) == 8 for group in samples for sample in group)
    naive = list(generate_naive(model, PROMPTS[1], 8))
    greedy = Engine(model).generate(PROMPTS[1:2], max_new_tokens=8, temperature=0)[0][0].tokens
    assert greedy[0] == naive[0]
    assert dtype != torch.float64 or greedy == naive
    cache, decoder = KVCache(1, 20, model), decoder_for(model)
    with torch.inference_mode():
        decoder.prefill(PROMPTS[1:2], cache)
        logits = decoder.step(torch.tensor([4]), cache)
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
        list(generate_cached(model, PROMPTS[0], 5))
    attention = {"_scaled_dot_product_flash_attention_for_cpu"}  # elsewhere torch takes the machine's own
    assert {"_softmax", "rsqrt", *attention} <= used
    general = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
    for name in used - attention:
        entry = entries[entries[name].get("structured_delegate", name)]
        backends = {backend.strip() for some in entry.get("dispatch", {}) for backend in some.split(",")}
        assert not backends or backends & {"MPS", *general}, name
    assert not any(dtype.is_complex or dtype == torch.float64 for dtype in dtypes)
