"""Laws of packing: what goes in comes out, once, in rows of the right form."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edu.data.packing import IGNORE, Batch, StreamPacker, TrainingExample, collate, pack_rows

BOS = 10**6
sizes = st.lists(st.integers(2, 17), min_size=0, max_size=60)


def pieces_of(lengths: list[int]) -> list[TrainingExample]:
    """Pieces with ids that are all different."""
    ends = np.cumsum(lengths)
    return [
        TrainingExample(np.arange(end - n, end), np.arange(n) % 3 > 0, weight=n / 7)
        for n, end in zip(lengths, ends, strict=True)
    ]


def stream_rows(lengths: list[int], T: int, buffer_size: int) -> tuple[list[list[int]], StreamPacker]:
    """All rows (BOS first) of a finite stream of documents with ids 0, 1, 2, ...; the last may be short."""
    ends = np.cumsum(lengths)
    documents = iter([np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)])
    packer, rows, number = StreamPacker(BOS, T), [], itertools.count()

    def refill() -> None:
        while len(packer.buffer.items) < buffer_size and (ids := next(documents, None)) is not None:
            packer.add((next(number), 0), ids)

    while filled := packer.rows(3, refill):
        for tokens, places in zip(*filled, strict=True):
            row, targets, positions = torch.from_numpy(tokens), torch.from_numpy(tokens[1:]), torch.from_numpy(places)
            learned = int((targets != IGNORE).sum())
            padding = learned + 1 if learned else 0
            assert (targets[learned:] == IGNORE).all()
            assert torch.equal(positions[:padding] == 0, row[:-1][:padding] == BOS)
            assert ((positions.diff() == 1) | (positions[1:] == 0)).all()
            assert positions[padding:].tolist() == list(range(T - padding))
            if learned:
                rows.append(row[: learned + 1].tolist())
    return rows, packer


@given(sizes, st.sampled_from([1, 3, 4096]))
@settings(deadline=None, max_examples=50)
def test_finite_packing_uses_each_piece_once_and_overfills_no_row(lengths: list[int], window: int) -> None:
    rows = pack_rows(pieces_of(lengths), 16, window)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] - 1 for i in row) <= 16 for row in rows)
    assert rows == pack_rows(pieces_of(lengths), 16, window)


@given(sizes)
@settings(deadline=None, max_examples=50)
def test_finite_packing_needs_at_most_eleven_ninths_of_the_fewest_rows(lengths: list[int]) -> None:
    fewest = -(-sum(n - 1 for n in lengths) // 16)
    halves = sum(n - 1 > 8 for n in lengths)
    assert len(pack_rows(pieces_of(lengths), 16)) <= 11 / 9 * max(fewest, halves) + 1 + len(lengths) / 9


def test_window_keeps_rows_near_the_order_of_the_list() -> None:
    items = pieces_of(np.random.default_rng(0).integers(2, 18, 3000).tolist())
    rows = pack_rows(items, 16, window=50)
    used = sum(len(items[i].ids) - 1 for row in rows for i in row) / (16 * len(rows))
    assert used > 0.97
    assert max(max(row) - min(row) for row in rows) < 3000
    assert max(row[0] for row in rows[:10]) < 200


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(AssertionError, match="example 1 has 18 tokens"):
        pack_rows(pieces_of([3, 18]), 16)


@given(sizes.filter(bool))
@settings(deadline=None, max_examples=50)
def test_collated_targets_and_weights_follow_the_mask(lengths: list[int]) -> None:
    items = pieces_of(lengths)
    rows = pack_rows(items, 16)
    batch = collate([[items[i] for i in row] for row in rows], 16, pad=5)
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            n = lengths[i] - 1
            ids, mask = np.asarray(items[i].ids), np.asarray(items[i].mask)
            assert batch.inputs[b, at : at + n].tolist() == ids[:-1].tolist()
            assert batch.targets[b, at : at + n].tolist() == [
                t if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)
            ]
            torch.testing.assert_close(
                batch.weights[b, at : at + n], torch.tensor(mask[1:] * np.float32(lengths[i] / 7))
            )
            assert batch.positions[b, at : at + n].tolist() == list(range(n))
            at += n
        assert set(batch.inputs[b, at:].tolist()) <= {5}
        assert set(batch.targets[b, at:].tolist()) <= {IGNORE}
        assert not batch.weights[b, at:].any()
        assert batch.positions[b, at:].tolist() == list(range(16 - at))


def test_a_target_with_zero_advantage_still_counts() -> None:
    batch = collate([[TrainingExample([1, 2, 3], [0, 1, 1], weight=np.array([9.0, 0.0, -0.5]))], []], 4)
    assert batch.targets.tolist() == [[2, 3, -1, -1], [-1] * 4]
    assert batch.weights.tolist() == [[0.0, -0.5, 0.0, 0.0], [0.0] * 4]
    assert int((batch.targets != IGNORE).sum()) == 2


def test_batch_moves_whole() -> None:
    batch = collate([[TrainingExample([1, 2, 3], [0, 1, 1])]], 4)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert [t.device.type for t in vars(moved).values()] == ["meta"] * 4


@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 12), st.sampled_from([1, 2, 8, 100]))
@settings(deadline=None, max_examples=50)
def test_stream_packing_loses_nothing_and_leaves_no_room(lengths: list[int], T: int, buffer_size: int) -> None:
    rows, packer = stream_rows(lengths, T, buffer_size)
    assert all(len(row) == T + 1 for row in rows[:-1])
    assert all(row[0] == BOS for row in rows)
    targets = Counter(token for row in rows for token in row[1:] if token != BOS)
    assert targets == Counter(range(sum(lengths)))
    assert packer.tokens == 0


@given(st.lists(st.integers(1, 60), min_size=1, max_size=50), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_a_document_ends_before_a_bos_or_a_row_end_and_nowhere_else(lengths: list[int], T: int) -> None:
    ends = set((np.cumsum(lengths) - 1).tolist())
    for row in stream_rows(lengths, T, 8)[0]:
        for token, following in itertools.pairwise(row):
            if token != BOS:
                assert following == (BOS if token in ends else token + 1)


def test_a_buffer_of_one_document_is_concatenation() -> None:
    lengths = [3, 9, 1, 20, 2]
    rows = stream_rows(lengths, 6, buffer_size=1)[0]
    assert [token for row in rows for token in row if token != BOS] == list(range(sum(lengths)))


def test_room_for_one_token_takes_a_bos_and_no_document() -> None:
    rows = stream_rows([11, 5], 12, 8)[0]
    assert rows == [[BOS, *range(11), BOS], [BOS, *range(11, 16)]]


def test_no_document_waits_forever() -> None:
    """Documents of 12 tokens fill rows of 13 exactly; best fit alone would pick them and never the one of 5."""
    rows = stream_rows([5, *[12] * 200], 12, buffer_size=4)[0]
    assert 0 in rows[0]
