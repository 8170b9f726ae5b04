"""Numba kernels for what lies between the matrix products of a decoding step (fp32, CPU).

torch takes twenty operators for it, each of which costs a microsecond or more to start and reads and writes everything
anew. Here each row has its own length, so that rows of unlike lengths need no mask. `edu.model.gpt` has the same
mathematics to read, and tests hold the kernels to it.

B rows, S positions, C channels, H query heads, K key/value heads, D head dim.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
"""Compiler flags that let a sum be taken in vectors: another order, fused with products. Infinities and NaN stay allowed."""
PART = 1_000_000
"""Cached numbers to read that are worth a thread of their own: 150 us or more, a thread wakes up in 50."""
LINE = 64
"""Bytes that memory gives at once."""
ZERO, ONE, LOG_2 = np.float32(0), np.float32(1), np.float32(math.log(2))


class Kept(FunctionCache):
    """Cache on disk of a function that numba compiled; compiled anew where it cannot be read, not kept where the disk is full."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (EOFError, UnpicklingError, ImportError, OSError):
            self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled when it is first called, in a second or two, and kept on disk where there is a place to write to."""
    dispatcher: Any = njit(fastmath=FASTMATH, error_model="numpy", nogil=True)(function)
    with suppress(RuntimeError):  # numba found no folder that it may write to
        dispatcher._cache = Kept(function)
    return dispatcher


def attend(parts: list[tuple[int, int]], *arguments: Any) -> None:
    """`attend_pairs` for each part of the pairs of a row and a key/value head, by a thread each where they are several."""
    if len(parts) == 1:
        attend_pairs(*arguments, *parts[0])
    else:
        for _ in THREADS.map(lambda part: attend_pairs(*arguments, *part), parts):
            pass


def divided(pairs: int, numbers: int) -> list[tuple[int, int]]:
    """The pairs divided among torch's threads, as far as so many cached numbers are worth it.

    >>> divided(6, 100)
    [(0, 6)]
    """
    parts = min(torch.get_num_threads(), pairs, 1 + numbers // PART)
    return list(pairwise(pairs * part // parts for part in range(parts + 1)))


THREADS = ThreadPoolExecutor(thread_name_prefix="attend")
"""None is started before it is needed."""


@compiled
def norm(x: np.ndarray, eps: float) -> None:
    """RMS norm of the rows of x (B, C), in place."""
    for b in range(len(x)):
        scale = _norm_scale(x[b], eps)
        for c in range(x.shape[1]):
            x[b, c] *= scale


@compiled
def relu_squared(x: np.ndarray, h: np.ndarray, eps: float) -> None:
    """h (B, 4C), which is x (B, C) times the weights, becomes relu(norm(x) times the weights)^2."""
    for b in range(len(x)):
        scale = _norm_scale(x[b], eps)
        for i in range(h.shape[1]):
            r = max(h[b, i] * scale, ZERO)
            h[b, i] = r * r


@compiled
def attend_pairs(
    x: np.ndarray,
    qkv: np.ndarray,
    rotation: np.ndarray,
    cache: np.ndarray,
    lengths: np.ndarray,
    eps: float,
    y: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Rotate and norm a new token's queries and keys, append its keys and values to the cache, attend: all into `y`.

    x (B, C): what norm(x) was to be multiplied with the weights. qkv (B, (H + 2K) D): x times the weights. A norm only
    scales, so it is done after the product. rotation (S, 2, D): cosines and sines. cache (B or more, 2, K, S, D), of
    which row b holds lengths[b] tokens. y (B, H D). Only for the pairs of a row and a key/value head from first to last.

    While it multiplies keys, memory is asked for the values and for the next pair's keys: a third of the time saved.
    """
    _, _, K, S, D = cache.shape
    H = y.shape[1] // D
    G = H // K
    queries, weights = np.empty((G, D), np.float32), np.empty((G, S), np.float32)
    for pair in range(first, last):
        b, k = pair // K, pair % K
        keys, values, new = cache[b, 0, k], cache[b, 1, k], lengths[b]
        heads = qkv[b].reshape(H + 2 * K, D)
        scale = _norm_scale(x[b], eps)
        _rotate_and_norm(heads[H + k], scale, rotation[new], eps, ONE, keys[new])
        for d in range(D):
            values[new, d] = heads[H + K + k, d] * scale
        for g in range(G):
            _rotate_and_norm(heads[k * G + g], scale, rotation[new], eps, ONE / np.float32(math.sqrt(D)), queries[g])
        following = min(pair + 1, last - 1)
        values_at, keys_at = values.ctypes.data, cache[following // K, 0, following % K].ctypes.data
        for s in range(new + 1):
            for line in range(s * 4 * D, (s + 1) * 4 * D, LINE):
                prefetch(values_at + line)
                prefetch(keys_at + line)
            for g in range(G):
                dot = ZERO
                for d in range(D):
                    dot += queries[g, d] * keys[s, d]
                weights[g, s] = dot
        for g in range(G):
            at = (k * G + g) * D
            _softmax(weights[g, : new + 1])
            y[b, at : at + D] = ZERO
            add_weighted(weights[g, : new + 1], values, y[b, at : at + D])


@compiled
def fingerprint(words: np.ndarray) -> np.uint64:
    """Hash words of 32 bits to 64. A factor is odd, so a product with it changes with the word: no single change is missed."""
    total = np.uint64(0)
    for i in range(len(words)):
        total += np.uint64(words[i]) * (np.uint64(2 * i + 1) * np.uint64(0x9E3779B97F4A7C15))
    return total


@compiled
def layer_of_one(
    x: np.ndarray,
    qkv: np.ndarray,
    out: np.ndarray,
    fc1: np.ndarray,
    fc2: np.ndarray,
    rotation: np.ndarray,
    cache: np.ndarray,
    lengths: np.ndarray,
    eps: float,
) -> None:
    """A layer for a single row: x (1, C) becomes what comes out. Weights are (inputs, outputs); the rest as in `attend_pairs`."""
    heads, y = np.zeros((1, qkv.shape[1]), np.float32), np.empty((1, out.shape[0]), np.float32)
    hidden = np.zeros((1, fc1.shape[1]), np.float32)
    add_weighted(x[0], qkv, heads[0])
    attend_pairs(x, heads, rotation, cache, lengths, eps, y, 0, cache.shape[2])
    add_weighted(y[0], out, x[0])
    add_weighted(x[0], fc1, hidden[0])
    relu_squared(x, hidden, eps)
    _add_weighted_some(hidden[0], fc2, x[0])  # relu leaves half of it zero, in a trained model four fifths


@compiled
def _norm_scale(x: np.ndarray, eps: float) -> float:
    """Return the factor that RMS norm multiplies x by."""
    total = ZERO
    for i in range(len(x)):
        total += x[i] * x[i]
    return ONE / np.sqrt(total / np.float32(len(x)) + eps)


@compiled
def _rotate_and_norm(
    x: np.ndarray, scale: float, rotation: np.ndarray, eps: float, factor: float, y: np.ndarray
) -> None:
    """y = factor norm(rotated scale x). A rotation leaves the length as it is, so that of x serves."""
    half = len(x) // 2
    total = ZERO
    for d in range(len(x)):
        total += x[d] * scale * x[d] * scale
    norm_scale = scale * factor / np.sqrt(total / np.float32(len(x)) + eps)
    for d in range(half):
        cos, sin = rotation[0, d], rotation[1, d]
        y[d] = (x[d] * cos + x[d + half] * sin) * norm_scale
        y[d + half] = (x[d + half] * cos - x[d] * sin) * norm_scale


@compiled
def _softmax(x: np.ndarray) -> None:
    """In place: e^x over the sum of all."""
    top, total = x[0], ZERO
    for s in range(len(x)):
        top = max(top, x[s])
    for s in range(len(x)):
        x[s] = _exp(x[s] - top)
        total += x[s]
    for s in range(len(x)):
        x[s] /= total


@compiled
def _exp(x: float) -> float:
    """e^x for x <= 0, to 2e-7, in a form that is computed for sixteen numbers at once, as math.exp is not.

    2^n e^r with n a whole number and r at most log(2) / 2 from zero; e^r by its series, 2^n by writing n as the exponent.
    """
    bounded = max(x, np.float32(-87))
    n = np.floor(bounded / LOG_2 + np.float32(0.5))
    r = bounded - n * LOG_2
    series = ONE + r / np.float32(6)
    series = ONE + r / np.float32(5) * series
    series = ONE + r / np.float32(4) * series
    series = ONE + r / np.float32(3) * series
    series = ONE + r / np.float32(2) * series
    series = ONE + r * series
    return series * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@compiled
def add_weighted(weights: np.ndarray, values: np.ndarray, y: np.ndarray) -> None:
    """y (D) += sum of weights[s] values[s], (S) and (S, D).

    Four at a time, so that y is read and written a quarter as often; from four places, which memory gives faster.
    """
    S, D = len(weights), len(y)
    Q = S // 4
    for s in range(Q):
        for d in range(D):
            y[d] += (weights[s] * values[s, d] + weights[s + Q] * values[s + Q, d]) + (
                weights[s + 2 * Q] * values[s + 2 * Q, d] + weights[s + 3 * Q] * values[s + 3 * Q, d]
            )
    for s in range(4 * Q, S):
        for d in range(D):
            y[d] += weights[s] * values[s, d]


@compiled
def _add_weighted_some(weights: np.ndarray, values: np.ndarray, y: np.ndarray) -> None:
    """`add_weighted` that reads only the values whose weight is not zero."""
    chosen, S, D = np.empty(len(weights), np.int64), 0, len(y)
    for s in range(len(weights)):
        chosen[S] = s
        S += weights[s] != ZERO
    Q = S // 4
    for s in range(Q):
        i, j, k, m = chosen[s], chosen[s + Q], chosen[s + 2 * Q], chosen[s + 3 * Q]
        for d in range(D):
            y[d] += (weights[i] * values[i, d] + weights[j] * values[j, d]) + (
                weights[k] * values[k, d] + weights[m] * values[m, d]
            )
    for s in range(4 * Q, S):
        for d in range(D):
            y[d] += weights[chosen[s]] * values[chosen[s], d]


def _ask_memory(_: Any, __: Any) -> tuple[Any, Callable[..., Any]]:
    """For numba: the type of `prefetch`, and what writes its instruction."""

    def write(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        to_read_and_keep_data = [ir.IntType(32)(flag) for flag in (0, 3, 1)]
        kind = ir.FunctionType(ir.VoidType(), [pointer.type] + [flag.type for flag in to_read_and_keep_data])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(instruction, [pointer, *to_read_and_keep_data])
        return context.get_dummy_value()

    return types.void(types.intp), write


prefetch: Any = intrinsic(_ask_memory)
"""Ask memory for the line at an address, and do not wait for it."""
