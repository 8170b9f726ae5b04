"""Bits per byte of text: of a model, and of n-gram models of the same tokens."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from edu.evaluation.evals import Evaluation

if TYPE_CHECKING:
    from torch import nn

    from edu.data.packing import Batch

PRIORS = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)  # pseudo-counts among which the bigram model chooses


def text_nats(model: "nn.Module", batches: "Iterable[Batch]", token_bytes: np.ndarray) -> Iterator[tuple[float, int]]:
    """Yield for each batch the sum of -log p over its targets that are text, in nats, and their bytes.

    token_bytes: raw bytes of each token, (V,), 0 for special tokens: document boundaries are no text and count on neither side.
    """
    import torch

    device = next(model.parameters()).device
    table = torch.as_tensor(token_bytes, device=device)
    for batch in batches:
        with torch.no_grad():
            on_device = batch.to(device)
            logprobs = model(on_device.inputs, targets=on_device.targets, position_ids=on_device.positions)
        n_bytes = table[on_device.targets.clamp(min=0)] * (on_device.targets >= 0)
        yield -float(logprobs[n_bytes > 0].cpu().double().sum()), int(n_bytes.sum())


def bits_per_byte(model: "nn.Module", batches: "Iterable[Batch]", token_bytes: np.ndarray) -> float:
    """Return the bits that the model needs for a byte of text: comparable between tokenizers. Evaluate the whole of the batches given."""
    return sum_bits(text_nats(model, batches, token_bytes))


def evaluate_text(model: "nn.Module", batches: "Iterable[Batch]", token_bytes: np.ndarray) -> Evaluation:
    """Evaluate bits per byte of text, with a record of each batch."""
    records = [
        {"index": i, "nats": nats, "bytes": n} for i, (nats, n) in enumerate(text_nats(model, batches, token_bytes))
    ]
    return Evaluation({"bits_per_byte": sum_bits((r["nats"], r["bytes"]) for r in records)}, records)


def sum_bits(measured: Iterable[tuple[float, int]]) -> float:
    """Return the bits per byte of several (nats, bytes) together: the ratio of the sums, not the mean of the ratios.

    >>> sum_bits([(math.log(2) * 8, 4), (math.log(2), 5)])
    1.0
    """
    nats, n_bytes = (sum(column) for column in zip((0.0, 0), *measured, strict=True))
    if not n_bytes:
        raise ValueError("no text to measure bits per byte on: the validation split is empty")
    return nats / math.log(2) / n_bytes


def ngram_bits_per_byte(
    train_batches: "Iterable[Batch]", val_batches: "Iterable[Batch]", token_bytes: np.ndarray, vocab_size: int
) -> dict[str, float]:
    """Return the bits per byte of a unigram and a bigram model of the same tokens.

    1. Unigram: add-one smoothed frequencies of the training targets.
    2. Bigram: p(b | a) = (count(a, b) + k p(b)) / (count(a) + k), backing off to the unigram (MacKay and Peto 1995).
       k is chosen on the last tenth of the training pairs, by counts of the other nine; the validation split has no say in it.
    """
    train, held = _pairs(train_batches), _pairs(val_batches)
    cut = len(train) * 9 // 10
    early, late = _Counts(train[:cut], vocab_size), train[cut:]
    k = max(PRIORS, key=lambda prior: float(early.bigram(late, prior).sum()))
    counts, n_bytes = _Counts(train, vocab_size), np.asarray(token_bytes)[held[:, 1]]
    is_text = n_bytes > 0

    def bits(logprobs: np.ndarray) -> float:
        return sum_bits([(-float(logprobs[is_text].sum()), int(n_bytes.sum()))])

    return {
        "unigram": bits(np.log(counts.unigram[held[:, 1]])),
        "bigram": bits(counts.bigram(held, k)),
        "bigram_prior": k,
    }


def _pairs(batches: "Iterable[Batch]") -> np.ndarray:
    """Return (N, 2): the token before, and the target, of every target that counts."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for batch in batches:
        kept = batch.targets >= 0
        found.append(np.stack([batch.inputs[kept].cpu().numpy(), batch.targets[kept].cpu().numpy()], axis=1))
    return np.concatenate(found)


class _Counts:
    """Counts of tokens and of pairs; pairs are kept as sorted keys, so that a large vocabulary costs no (V, V) table."""

    def __init__(self, pairs: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigram = (np.bincount(pairs[:, 1], minlength=vocab_size) + 1) / (len(pairs) + vocab_size)
        self.before = np.bincount(pairs[:, 0], minlength=vocab_size)
        self.keys, self.counts = np.unique(pairs[:, 0] * vocab_size + pairs[:, 1], return_counts=True)

    def bigram(self, pairs: np.ndarray, prior: float) -> np.ndarray:
        """Return the log-probability of each pair's second token, (N,), nats."""
        keys = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        places = np.searchsorted(self.keys, keys).clip(max=max(len(self.keys) - 1, 0))
        count = np.where(self.keys[places] == keys, self.counts[places], 0) if len(self.keys) else np.zeros(len(keys))
        return np.log((count + prior * self.unigram[pairs[:, 1]]) / (self.before[pairs[:, 0]] + prior))
