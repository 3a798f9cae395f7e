"""Paged attention against dense attention, one query at a time in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference_attention, reference_chunk
from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference import AttentionPlan, Scratch, paged_attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
NUM_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4


@dataclass(frozen=True)
class Case:
    """Sequences of (context length, query tokens) with random contents on scattered blocks."""

    q: torch.Tensor
    keys: list[torch.Tensor]  # by sequence [length, kv_heads, D]
    values: list[torch.Tensor]
    cache: torch.Tensor
    step: AttentionStep


def make(
    seqs: list[tuple[int, int]], shape: Shape, dtype: torch.dtype, layer: int, spare_columns: int = 0
) -> Case:
    size = shape.block_size
    needed = [-(-length // size) for length, _ in seqs]
    num_blocks = sum(needed) + 3
    free = torch.randperm(num_blocks).tolist()
    # Stale contents everywhere: what is not the sequence's own must not be seen.
    cache = torch.randn(num_blocks, NUM_LAYERS, 2, shape.num_kv_heads, size, shape.head_dim).to(dtype) * 5
    tables = torch.zeros(len(seqs), max(needed) + spare_columns, dtype=torch.int64)
    keys, values, slots, starts = [], [], [], [0]
    for s, (length, queries) in enumerate(seqs):
        blocks = torch.tensor([free.pop() for _ in range(needed[s])])
        tables[s, : len(blocks)] = blocks
        k = torch.randn(length, shape.num_kv_heads, shape.head_dim).to(dtype)
        v = torch.randn(length, shape.num_kv_heads, shape.head_dim).to(dtype)
        position = torch.arange(length)
        cache[blocks[position // size], layer, 0, :, position % size] = k
        cache[blocks[position // size], layer, 1, :, position % size] = v
        keys.append(k)
        values.append(v)
        slots.append((blocks[position // size] * size + position % size)[length - queries :])
        starts.append(starts[-1] + queries)
    q = torch.randn(starts[-1], shape.num_heads, shape.head_dim).to(dtype)
    step = AttentionStep.of(starts, [length for length, _ in seqs], tables, torch.cat(slots))
    return Case(q, keys, values, cache, step)


def dense(
    case: Case,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    for s, length in enumerate(case.step.lengths.tolist()):
        start, end = case.step.query_start[s : s + 2].tolist()
        group = case.q.shape[1] // case.keys[s].shape[1]
        k = case.keys[s].double().repeat_interleave(group, 1)
        v = case.values[s].double().repeat_interleave(group, 1)
        for row in range(start, end):
            position = length - (end - row)
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,khd->hk", case.q[row].double(), k[seen]) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:  # a key whose value is zero
                scores = torch.cat((scores, sinks.double()[:, None]), 1)
            weights = torch.softmax(scores, -1)[:, : k[seen].shape[0]]
            out[row] = torch.einsum("hk,khd->hd", weights, v[seen])
    return out


def check(case: Case, dtype: torch.dtype, layer: int, window: int | None) -> None:
    got = paged_attention(case.q, PagedKv.of(case.cache), layer, case.step, 0.3, window)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), dense(case, 0.3, window), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


BATCHES = {
    "one_token": [(1, 1)],
    "decode": [(5, 1), (8, 1), (1, 1), (31, 1)],
    "whole_prompt": [(9, 9)],
    "chunk_after_prefix": [(21, 6)],
    "mixed": [(12, 1), (7, 7), (30, 1), (18, 5), (2, 1), (33, 2)],
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("seqs", BATCHES.values(), ids=BATCHES)
def test_equals_dense_attention(seqs: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(make(seqs, Shape(), dtype, layer=1, spare_columns=2), dtype, 1, window)


@pytest.mark.parametrize(
    "shape", [Shape(4, 4), Shape(9, 3, 64, 16), Shape(8, 1, 16, 1), Shape(3, 1, 10, 5)], ids=str
)
@pytest.mark.parametrize("window", [None, 6])
def test_head_groups_and_block_sizes(shape: Shape, window: int | None) -> None:
    torch.manual_seed(2)
    check(make(BATCHES["mixed"], shape, torch.float32, layer=0), torch.float32, 0, window)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seqs", [*BATCHES.values(), [(300, 300)]], ids=str)
def test_sinks(seqs: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    case, sinks = make(seqs, Shape(6, 2), dtype, layer=1), torch.randn(6).to(dtype)
    got = paged_attention(case.q, PagedKv.of(case.cache), 1, case.step, 0.3, window, sinks)
    expected = dense(case, 0.3, window, sinks)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seqs", [*BATCHES.values(), [(300, 300)]], ids=str)
def test_softcap(seqs: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    case = make(seqs, Shape(6, 2), dtype, layer=1)
    got = paged_attention(case.q, PagedKv.of(case.cache), 1, case.step, 0.3, window, softcap=0.8)
    expected = dense(case, 0.3, window, softcap=0.8)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("seqs", [*BATCHES.values(), [(300, 300)]], ids=str)
def test_one_plane_whose_rows_are_keys_and_values(seqs: list[tuple[int, int]]) -> None:
    torch.manual_seed(5)
    case = make(seqs, Shape(4, 1), torch.float32, layer=1)
    one = Case(case.q, case.keys, case.keys, case.cache[:, :, :1].contiguous(), case.step)
    check(one, torch.float32, 1, None)
    plan = AttentionPlan(one.step, PagedKv.of(one.cache))
    rows = torch.randn(one.q.shape[0], 8)
    before = one.cache.clone()
    plan.write_latents(0, rows)
    slots = one.step.slots
    assert torch.equal(one.cache[slots // 4, 0, 0, 0, slots % 4], rows)
    assert torch.equal(one.cache[:, 1], before[:, 1])


@pytest.mark.parametrize("window", [None, 5, 40, 200])
@pytest.mark.parametrize("seqs", [[(300, 300)], [(333, 290), (140, 1)], [(129, 129)]], ids=str)
def test_chunks_of_several_tiles(seqs: list[tuple[int, int]], window: int | None) -> None:
    assert max(queries for _, queries in seqs) > reference_chunk.QUERY_TILE
    torch.manual_seed(3)
    check(make(seqs, Shape(), torch.float32, layer=1), torch.float32, 1, window)


@settings(max_examples=40, deadline=None)
@given(
    seqs=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60)).map(lambda p: (max(p), min(p))),
        min_size=1,
        max_size=5,
    ),
    window=st.none() | st.integers(1, 70),
    block_size=st.integers(1, 9),
    tile=st.integers(1, 20),
)
def test_any_batch(seqs: list[tuple[int, int]], window: int | None, block_size: int, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_chunk, "QUERY_TILE", tile)
        check(make(seqs, Shape(block_size=block_size), torch.float32, layer=1), torch.float32, 1, window)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=9), gain=st.integers(0, 60))
def test_grouping_by_length_changes_nothing(lengths: list[int], gain: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_attention, "SPLIT_GAIN_BLOCKS", gain)
        check(
            make([(length, 1) for length in lengths], Shape(), torch.float32, layer=0), torch.float32, 0, None
        )


def test_very_different_lengths_are_not_padded_to_the_longest() -> None:
    singles = [
        reference_attention._Single(row, row, 0, blocks, 0, blocks)
        for row, blocks in enumerate([4, 400, 5, 4, 398, 6])
    ]
    groups = reference_attention._by_length(singles)
    assert [[item.row for item in group] for group in groups] == [[1, 4], [0, 2, 3, 5]]


def test_one_plan_serves_every_layer_and_window() -> None:
    torch.manual_seed(4)
    case = make(BATCHES["mixed"], Shape(), torch.float32, layer=1)
    plan = AttentionPlan(case.step, PagedKv.of(case.cache), Scratch())
    for window in (None, 5, None):
        got = plan.attend(case.q, 1, 0.3, window)
        torch.testing.assert_close(got.double(), dense(case, 0.3, window), rtol=1e-5, atol=1e-5)
