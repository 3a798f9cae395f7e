"""Attention over int8 and fp8 caches in eager torch: that over the floats which their bytes stand for."""

from __future__ import annotations

import pytest
import torch

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from kernels.reference import AttentionPlan, paged_attention
from kernels.reference_relayout import Wire, compress
from tests.kernels.test_paged_attention import BATCHES, Case, Shape, make

WIRES: tuple[Wire, ...] = ("int8", "fp8")
STEP = 3e-2  # of a row's largest value: half a step of e4m3, and of int8 less


def quantized(case: Case, wire: Wire) -> PagedKv:
    size, dim = case.cache.shape[4:]
    return PagedKv.of_tiles(compress(case.cache, wire), size, dim, wire)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("seqs", BATCHES.values(), ids=BATCHES)
def test_equals_attention_over_what_it_stands_for(
    seqs: list[tuple[int, int]], window: int | None, wire: Wire
) -> None:
    torch.manual_seed(1)
    case = make(seqs, Shape(), torch.float32, layer=1)
    cache = quantized(case, wire)
    sinks = torch.randn(4)
    got = paged_attention(case.q, cache, 1, case.step, 0.3, window, sinks, softcap=20.0)
    floats = PagedKv.of(cache.values())
    expected = paged_attention(case.q, floats, 1, case.step, 0.3, window, sinks, softcap=20.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, paged_attention(case.q, PagedKv.of(case.cache), 1, case.step, 0.3, window))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("planes", [1, 2])
def test_what_is_written_is_what_the_wire_would_carry(planes: int, wire: Wire) -> None:
    torch.manual_seed(2)
    heads, size, dim = (1 if planes == 1 else 3), 4, 8
    floats = torch.zeros(5, 2, planes, heads, size, dim)
    tiles = compress(floats, wire)
    slots = torch.tensor([9, 2, -1, 16])
    step = AttentionStep.of([0, 4], [4], torch.zeros(1, 1, dtype=torch.int64), slots)
    rows = torch.randn(planes, 4, heads, dim)
    for cache in (PagedKv.of(floats), PagedKv.of_tiles(tiles, size, dim, wire)):
        plan = AttentionPlan(step, cache)
        if planes == 1:
            plan.write_latents(1, rows[0, :, 0])
        else:
            plan.write(1, rows[0], rows[1])
    assert torch.equal(tiles, compress(floats, wire))
    assert int(floats.abs().sum(-1).count_nonzero()) == 3 * planes * heads


@pytest.mark.parametrize("wire", WIRES)
def test_bfloat16_attends_to_it_too(wire: Wire) -> None:
    torch.manual_seed(3)
    case = make(BATCHES["mixed"], Shape(), torch.bfloat16, layer=0)
    got = paged_attention(case.q, quantized(case, wire), 0, case.step, 0.3, None)
    assert got.dtype == torch.bfloat16
    expected = paged_attention(case.q.float(), quantized(case, wire), 0, case.step, 0.3, None)
    torch.testing.assert_close(got.float(), expected, rtol=STEP, atol=STEP)
