"""Chapter 5: the loops that numba compiles, against numpy in fp64."""

import errno
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_04_model import random_gpt

from edu.model.kv_cache import KVCache

numba = pytest.importorskip("numba")
kernels = pytest.importorskip("edu.fast.cpu_kernels")
CPUDecoder = pytest.importorskip("edu.fast.cpu_decoder").CPUDecoder
njit, compiled, fingerprint, prefetch = numba.njit, kernels.compiled, kernels.fingerprint, kernels.prefetch


@njit(fastmath=kernels.FASTMATH)  # not kept on disk: numba would not see that what it calls has changed
def exponentials(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        y[i] = kernels._exp(x[i])


def test_the_exponential_is_exact_to_a_few_roundings() -> None:
    x = np.concatenate([np.linspace(-87, 0, 100_001), [-1e-30, -0.0, -88, -1e4, -np.inf]]).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(y, exact, atol=2e-7, rtol=0)
    np.testing.assert_allclose(y[x > -10], exact[x > -10], rtol=1e-6)
    assert y[x == 0].tolist() == [1.0] * 2
    exponentials(x[:1] * np.float32(math.nan), y[:1])
    assert np.isnan(y[0]), "what is not a number stays so"


def test_softmax_of_large_numbers() -> None:
    x = np.array([0, 100, 200, 199, -1e6], np.float32)
    kernels._softmax(x)
    np.testing.assert_allclose(x, torch.tensor([0, 100, 200, 199, -1e6], dtype=torch.float64).softmax(-1), atol=1e-6)
    assert (x >= 0).all(), "powers of two have wrapped around"


@pytest.mark.parametrize("positions", [0, 1, 3, 4, 5, 8, 131])
@pytest.mark.parametrize("width", [1, 2, 16, 50])
@pytest.mark.parametrize("share_of_zeros", [0.0, 0.6, 1.0])
def test_sums_of_weighted_rows(positions: int, width: int, share_of_zeros: float) -> None:
    random = np.random.default_rng(0)
    values, start = random.normal(size=(positions, width)), random.normal(size=width)
    weights = random.normal(size=positions) * (random.random(positions) >= share_of_zeros)
    for add in (kernels.add_weighted, kernels._add_weighted_some):
        y = start.astype(np.float32)
        add(weights.astype(np.float32), values.astype(np.float32), y)
        np.testing.assert_allclose(y, start + weights @ values, atol=1e-5)


def test_weights_of_zero_are_not_read() -> None:
    values = np.full((9, 4), np.nan, np.float32)
    values[[2, 5]] = 1.0
    weights, y = np.zeros(9, np.float32), np.zeros(4, np.float32)
    weights[[2, 5]] = 3.0
    kernels._add_weighted_some(weights, values, y)
    assert y.tolist() == [6.0] * 4


def test_a_row_alone_takes_one_call_a_layer_and_many_rows_take_oneDNN(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("layer_of_one", "attend"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(f"edu.fast.cpu_decoder.{name}", lambda *a, k=kernel, n=name: (calls.append(n), k(*a)))
    model = random_gpt(vocab_size=50)
    decoder, cache = CPUDecoder(model), KVCache(2, 8, model)
    decoder.step(torch.tensor([4]), cache)
    assert calls == ["layer_of_one"] * model.config.num_hidden_layers
    decoder.step(torch.tensor([4, 5]), cache)
    assert calls[len(calls) // 2 :] == ["attend"] * model.config.num_hidden_layers


def test_a_full_cache_is_not_written_past_its_end() -> None:
    model = random_gpt(vocab_size=50)
    cache = KVCache(1, 8, model)
    cache.lengths = [8]
    with pytest.raises(AssertionError, match="rows of 8 tokens and one more: there is room for 8"):
        CPUDecoder(model).step(torch.tensor([4]), cache)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[3, 9, 2, 16], [9, 9], [7], [2, 1]], ids=["ragged", "even", "alone", "short"])
@pytest.mark.parametrize("threads", [1, 3], ids=["loops", "loops on several threads, packed weights"])
def test_the_decoder_computes_what_the_model_does(
    kv_heads: int, lengths: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("edu.fast.cpu_decoder.FROM_CACHE", 0)
    monkeypatch.setattr("edu.fast.cpu_kernels.PART", 1)
    # An epsilon so large that none can be left out.
    model = random_gpt(vocab_size=50, num_key_value_heads=kv_heads, rms_norm_eps=0.1)
    prompts = [torch.randint(0, 50, (length,)).tolist() for length in lengths]
    cache, decoder = KVCache(len(prompts), 20, model), CPUDecoder(model)
    decoder.prefill(prompts, cache)
    for token in (4, 41, 7):
        logits = decoder.step(torch.tensor([token] * len(prompts)), cache)
        prompts = [[*prompt, token] for prompt in prompts]
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_any_changed_word_changes_the_fingerprint_and_so_does_their_order() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    first = fingerprint(words)
    for at in (0, 1, 500, 999):
        for bit in (0, 31):
            changed = words.copy()
            changed[at] ^= np.uint32(1 << bit)
            assert fingerprint(changed) != first
    assert fingerprint(words[::-1].copy()) != first
    assert fingerprint(words.copy()) == first


def test_pairs_are_divided_by_how_much_there_is_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for pairs in (1, 3, 4, 129):
        for numbers in (0, kernels.PART, 100 * kernels.PART):
            parts = kernels.divided(pairs, numbers)
            assert [i for first, last in parts for i in range(first, last)] == list(range(pairs))
            assert len(parts) == min(4, pairs, 1 + numbers // kernels.PART)


def test_an_error_in_a_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(first: int, _: int) -> None:
        if first:
            raise ValueError(threading.current_thread().name)

    monkeypatch.setattr(kernels, "attend_pairs", broken)
    with pytest.raises(ValueError, match="attend"):
        kernels.attend([(0, 2), (2, 4)])


def doubled(x: int) -> int:
    return 2 * x


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where numba keeps what it compiles."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("damaged", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"no pickle"])
def test_what_is_kept_and_damaged_is_compiled_anew(kept: Path, damaged: str, content: bytes) -> None:
    assert compiled(doubled)(4) == 8
    (path,) = kept.rglob(damaged)
    path.write_bytes(content)
    again = compiled(doubled)
    assert again(4) == 8
    assert not again.stats.cache_hits
    third = compiled(doubled)
    assert third(4) == 8
    assert third.stats.cache_hits, "it was kept again"


def test_where_nothing_can_be_kept_it_is_compiled_each_time(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert compiled(doubled)(4) == 8
    assert not [*kept.rglob("*.nb*")]

    def nowhere(*_: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.caching.FunctionCache.__init__", nowhere)
    assert compiled(doubled)(4) == 8


def ask(address: int) -> None:
    prefetch(address)


def test_memory_may_be_asked_for_any_address() -> None:
    asked = njit(ask)
    for address in (0, -1, 2**62):
        asked(address)  # a prefetch that leads nowhere is no fault
    assert "prefetch" in next(iter(asked.inspect_asm().values())), "it is left out"
