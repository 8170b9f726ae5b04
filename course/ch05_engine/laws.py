"""The laws of chapter 5, and the mistakes that they must name."""

import time
from typing import Any

import torch

from course.grading import Mutant

TITLE = "the KV cache and the engine"
PROVIDES = ("KVCache", "CausalSelfAttention", "GPT", "generate_naive", "Engine")
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [9])


def _model(m: Any) -> Any:
    """A model with random weights in which greedy choices are clear."""
    from course.ch04_block.solution import Config

    model = m.GPT(Config()).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model


def law_shape(m: Any) -> None:
    """The cache is one tensor, (B, n_layer, 2, n_kv_head, max_seq_len, head_dim), allocated once."""
    cache = m.KVCache(2, 3, 2, 8, 16)
    assert tuple(cache.tensor.shape) == (2, 3, 2, 2, 8, 16), f"the tensor is {tuple(cache.tensor.shape)}"
    assert cache.length == 0, f"an empty cache has length {cache.length}"
    before = cache.tensor.data_ptr()
    for layer in range(3):
        cache.insert_kv(layer, torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16))
    assert cache.tensor.data_ptr() == before, "the tensor was made anew while writing: a cache grows in place"


def law_layers_write_at_one_place(m: Any) -> None:
    """All layers of one pass write at the same positions; what comes back is all so far."""
    cache = m.KVCache(1, 3, 2, 8, 4)
    written: dict[int, torch.Tensor] = {}
    for step, T in enumerate((3, 1)):
        for layer in range(3):
            k = torch.randn(1, 2, T, 4, generator=torch.Generator().manual_seed(10 * step + layer))
            keys, values = cache.insert_kv(layer, k, -k)
            written[layer] = torch.cat((written[layer], k), 2) if step else k
            expected = written[layer].shape[2]
            assert keys.shape[2] == values.shape[2] == expected, (
                f"pass {step}, layer {layer}: {keys.shape[2]} keys and {values.shape[2]} values came back, "
                f"{expected} were written: does the length move once a pass, after the last layer?"
            )
            assert torch.equal(keys, written[layer]), f"layer {layer}: the keys that come back are not those written"
            assert torch.equal(values, -written[layer]), (
                f"layer {layer}: the values that come back are not those written"
            )
    assert cache.length == 4, f"3 and then 1 positions were written by every layer; the length is {cache.length}"


@torch.no_grad()
def law_attention_uses_the_cache(m: Any) -> None:
    """The attention writes its keys and values to the cache it is given, and only the new ones."""
    model = _model(m)
    cache, seen = model.make_cache(1, 16), []
    insert = cache.insert_kv
    cache.insert_kv = lambda layer, k, v: (seen.append((layer, k.shape[2])), insert(layer, k, v))[1]
    model(torch.tensor([[3, 1, 4]]), cache)
    model(torch.tensor([[1]]), cache)
    assert seen == [(0, 3), (1, 3), (0, 1), (1, 1)], (
        f"(layer, new positions) of the calls of insert_kv: {seen}; expected 3 positions a layer, then 1 a layer"
    )


@torch.no_grad()
def law_pieces(m: Any) -> None:
    """A prompt read in two pieces gives the logits of the prompt read at once."""
    model, ids = _model(m), torch.tensor([[1, 5, 9, 2, 6, 5, 3]])
    for cut in (1, 4, 6):
        cache = model.make_cache(1, 16)
        model(ids[:, :cut], cache)
        second = model(ids[:, cut:], cache)[0]
        apart = float((second - model(ids)[0, cut:]).abs().max())
        assert apart < 1e-3, (
            f"{cut} tokens, then {7 - cut}: logits {apart:.3f} off; positions and mask both start at the cached length"
        )


def law_cached_is_naive(m: Any) -> None:
    """Greedy decoding through the cache gives the tokens of the naive loop."""
    model, engine = _model(m), m.Engine(_model(m))
    for prompt in PROMPTS:
        naive, (cached,) = m.generate_naive(model, prompt, 20), engine.generate(prompt, 20)
        assert len(naive) == len(cached) == 20, f"asked for 20 new tokens: naive {len(naive)}, cached {len(cached)}"
        where = next((i for i in range(20) if naive[i] != cached[i]), None)
        assert where is None, (
            f"a prompt of {len(prompt)}: new token {where} is the first that differs ({'prefill' if where == 0 else 'decode'})"
        )


@torch.no_grad()
def law_naive_is_greedy(m: Any) -> None:
    """The naive loop takes the likeliest next token after the whole text so far."""
    model, ids = _model(m), list(PROMPTS[1])
    for i, token in enumerate(m.generate_naive(model, ids, 8)):
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
        assert token == best, f"new token {i} is {token}; the model's likeliest is {best}"
        ids.append(token)


def law_prompt_read_once(m: Any) -> None:
    """The prompt is read once, whatever the number of samples, then one token a row a step."""
    model, seen = _model(m), []
    model.embed.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    m.Engine(model).generate(PROMPTS[1], 4, num_samples=3, temperature=1.0)
    whole = [(1, 9), (3, 1), (3, 1), (3, 1)]
    without_last = [(1, 8), (3, 1), (3, 1), (3, 1), (3, 1)]  # the prompt's last token may be the first step's
    assert seen in (whole, without_last), (
        f"(rows, positions) of the forward passes: {seen}; expected {whole}, and none after the last token"
    )


def law_stop(m: Any) -> None:
    """A stop token ends its sample and is kept, since training needs it; the others go on."""
    engine = m.Engine(_model(m))
    (full,) = engine.generate(PROMPTS[0], 20)
    stop = full[4]
    (ended,) = engine.generate(PROMPTS[0], 20, stop_tokens=(stop,))
    assert ended == full[: full.index(stop) + 1], (
        f"with stop token {stop} expected {full[: full.index(stop) + 1]}, got {ended}"
    )
    free = engine.generate(PROMPTS[0], 12, num_samples=4, temperature=1.5, seed=5)
    stop = free[0][3]
    for sample, whole in zip(engine.generate(PROMPTS[0], 12, 4, 1.5, (stop,), 5), free, strict=True):
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert sample == expected, f"a sample that ended changed another: expected {expected}, got {sample}"


def law_own_random_numbers(m: Any) -> None:
    """A sample does not depend on how many others stand beside it, and the samples differ."""
    engine = m.Engine(_model(m))
    four = engine.generate(PROMPTS[0], 12, num_samples=4, temperature=1.5, seed=5)
    two = engine.generate(PROMPTS[0], 12, num_samples=2, temperature=1.5, seed=5)
    assert four[:2] == two, (
        "samples 0 and 1 change when 2 and 3 stand beside them: each needs random numbers of its own"
    )
    firsts = {sample[0] for sample in engine.generate(PROMPTS[0], 1, num_samples=12, temperature=1.5, seed=5)}
    assert len(firsts) > 1, "12 samples at temperature 1.5 share their first token: is it drawn once and copied?"
    assert four == engine.generate(PROMPTS[0], 12, num_samples=4, temperature=1.5, seed=5), (
        "the same seed gave other samples"
    )
    assert four != engine.generate(PROMPTS[0], 12, num_samples=4, temperature=1.5, seed=6), (
        "another seed gave the same samples"
    )


@torch.no_grad()
def law_temperature(m: Any) -> None:
    """Sampling follows softmax(logits / temperature)."""
    model, number = _model(m), 3000
    for temperature in (0.7, 2.0):
        first = [sample[0] for sample in m.Engine(model).generate(PROMPTS[0], 1, number, temperature, seed=1)]
        expected = (model(torch.tensor([PROMPTS[0]]))[0, -1] / temperature).softmax(-1)
        found = torch.bincount(torch.tensor(first), minlength=len(expected)) / number
        worst = int((found - expected).abs().argmax())
        apart = float((found - expected).abs().max())
        assert apart < 0.05, (
            f"temperature {temperature}: token {worst} was drawn {float(found[worst]):.2f} of the time, "
            f"softmax(logits / temperature) says {float(expected[worst]):.2f}"
        )


def law_faster(m: Any) -> None:
    """With a cache, 200 tokens come at least one and a half times as fast as without."""
    model, engine, prompt = _model(m), m.Engine(_model(m)), [7] * 8
    best = {"naive": 1e9, "cached": 1e9}
    for _ in range(2):  # the first round warms up
        for name, run in (
            ("naive", lambda: m.generate_naive(model, prompt, 200)),
            ("cached", lambda: engine.generate(prompt, 200)),
        ):
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    ratio = best["naive"] / best["cached"]
    assert ratio > 1.5, (
        f"naive {best['naive']:.2f} s, cached {best['cached']:.2f} s: {ratio:.1f} times, expected 1.5 or more"
    )


MUTANTS = [
    Mutant("length moves at every layer", "if layer == self.tensor.shape[1] - 1:", "if True:", "layers_write_at_one_place"),
    Mutant("keys stored as values", "self.tensor[:, layer, 1, :, self.length : end] = v", "self.tensor[:, layer, 1, :, self.length : end] = k", "layers_write_at_one_place"),
    Mutant("the cache is never read", "k, v = cache.insert_kv(layer, k, v)  # (B, K, S, D)", "cache.insert_kv(layer, k, v)\n            start = 0", "pieces"),
    Mutant("decoding restarts the positions", "rotary_angles(torch.arange(start, start + T)", "rotary_angles(torch.arange(T)", "pieces"),
    Mutant("new tokens of a piece see ahead", ".tril(start)", ".tril(start + T)", "pieces"),
    Mutant("the newest token is left out", "logits = self.model(torch.tensor([prompt]), one)[:, -1]", "logits = self.model(torch.tensor([prompt]), one)[:, 0]", "cached_is_naive"),
    Mutant("the prompt is read for every sample", "one = self.model.make_cache(1, room)\n        logits = self.model(torch.tensor([prompt]), one)[:, -1]  # (1, V)", "one = self.model.make_cache(num_samples, room)\n        logits = self.model(torch.tensor([prompt] * num_samples), one)[:, -1]", "prompt_read_once"),
    Mutant("stop token dropped", "                    samples[i].append(token)\n                    live[i] = token not in stop_tokens", "                    live[i] = token not in stop_tokens\n                    if live[i]:\n                        samples[i].append(token)", "stop"),
    Mutant("one stop ends all", "if not any(live)", "if not all(live)", "stop"),
    Mutant("first token copied to all samples", "generator=own)) for row, own in zip(rows, random, strict=True)]", "generator=own)) for row, own in zip(rows, random, strict=True)]\n                chosen = chosen if step else [chosen[0]] * num_samples", "own_random_numbers"),
    Mutant("random numbers shared", "generator=own))", "generator=random[0]))", "own_random_numbers"),
    Mutant("multiplied by the temperature", "(logits / temperature)", "(logits * temperature)", "temperature"),
    Mutant("no cache while decoding", "logits = self.model(torch.tensor(chosen)[:, None], cache)[:, -1]  # (B, V)", "whole = [prompt + sample + [0] * (step + 1 - len(sample)) for sample in samples]\n            logits = self.model(torch.tensor(whole))[:, -1]", "prompt_read_once"),
]  # fmt: skip
