"""What test_triton.py runs in a process of its own: under Triton's interpreter, or on the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference_relayout
from kernels.attention_step import AttentionStep
from kernels.reference_attention import paged_attention as reference_attention
from kernels.reference_relayout import Wire
from kernels.triton import attention
from kernels.triton.attention import Tiling, paged_attention
from kernels.triton.paged_kv import PagedKv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYERS, LAYER = 2, 1
SMALL = Tiling(heads=3, rows=16, keys=16, parts=3, least=32)  # of three heads that share a KV head
UNSPLIT = replace(SMALL, parts=1)
# (context, queries) of each sequence
DECODE = [(5, 1), (64, 1), (1, 1), (101, 1)]
PREFILL = [(9, 9), (45, 21)]
MIXED = [(70, 1), (7, 7), (40, 18), (2, 1), (66, 3)]


@dataclass(frozen=True)
class Shape:
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 24
    block_size: int = 4
    planes: int = 2


@dataclass(frozen=True)
class Case:
    q: Tensor
    cache: Tensor
    step: AttentionStep


def make(seqs: list[tuple[int, int]], shape: Shape, dtype: torch.dtype = torch.float32) -> Case:
    """Random contents everywhere, blocks scattered, tables padded."""
    generator = torch.Generator().manual_seed(len(seqs) + shape.head_dim + shape.num_heads)
    needed = [-(-length // shape.block_size) for length, _ in seqs]
    free = torch.randperm(sum(needed) + 3, generator=generator)
    dims = (len(free), LAYERS, shape.planes, shape.num_kv_heads, shape.block_size, shape.head_dim)
    tables = torch.zeros(len(seqs), max(needed) + 2, dtype=torch.int64)
    starts, slots, taken = [0], [], 0
    for s, (length, queries) in enumerate(seqs):
        tables[s, : needed[s]] = free[taken : taken + needed[s]]
        taken += needed[s]
        starts.append(starts[-1] + queries)
        position = torch.arange(length - queries, length)
        slots.append(tables[s, position // shape.block_size] * shape.block_size + position % shape.block_size)
    step = AttentionStep.of(starts, [length for length, _ in seqs], tables, torch.cat(slots), DEVICE)
    q = torch.randn(starts[-1], shape.num_heads, shape.head_dim, generator=generator)
    cache = torch.randn(dims, generator=generator) * 1.5
    return Case(q.to(DEVICE, dtype), cache.to(DEVICE, dtype), step)


def dense(
    case: Case,
    cache: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Each sequence's queries against all of its keys, in float64."""
    heads, kv_heads, size = case.q.shape[1], cache.shape[3], cache.shape[4]
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    values = cache[:, LAYER].cpu().double()
    for s, length in enumerate(case.step.lengths.tolist()):
        rows = slice(*case.step.query_start[s : s + 2].tolist())
        key = torch.arange(length)
        own = values[
            case.step.block_tables[s].cpu()[key // size], :, :, key % size
        ]  # [length, planes, kv_heads, D]
        k, v = (own[:, plane].repeat_interleave(heads // kv_heads, 1) for plane in (0, -1))
        scores = torch.einsum("qhd,khd->hqk", case.q[rows].cpu().double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - scores.shape[1], length)[:, None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:  # a key whose value is zero
            extra = sinks.cpu().double()[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat((scores, extra), -1)
            v = torch.cat((v, torch.zeros_like(v[:1])))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out


def check(case: Case, cache: PagedKv | None = None, tiling: Tiling | None = SMALL, **options: object) -> None:
    """With all heads that share a KV head in one tile where the tiling is for others."""
    held = cache or PagedKv.of(case.cache)
    group = case.q.shape[1] // held.num_kv_heads
    if tiling is not None and group % tiling.heads:
        tiling = replace(tiling, heads=group)
    got = paged_attention(case.q, held, LAYER, case.step, 0.3, tiling=tiling, **options)  # type: ignore[arg-type]
    want = dense(case, held.values(), 0.3, **options)  # type: ignore[arg-type]
    bound = TOLERANCE[case.q.dtype]
    assert got.dtype == case.q.dtype
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("seqs", "window", "tiling"),
    [
        pytest.param(DECODE, None, SMALL, id="decode"),
        pytest.param(MIXED, 50, SMALL, id="mixed"),
        pytest.param(PREFILL, 7, UNSPLIT, id="prefill"),
        *(
            pytest.param(seqs, window, tiling, marks=slow)
            for seqs in (DECODE, PREFILL, MIXED)
            for window in (None, 7, 50)
            for tiling in (SMALL, UNSPLIT)
        ),
    ],
)
def test_equals_dense_attention(seqs: list[tuple[int, int]], window: int | None, tiling: Tiling) -> None:
    check(make(seqs, Shape()), tiling=tiling, window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqs", [pytest.param(DECODE, marks=slow), MIXED], ids=["decode", "mixed"])
def test_of_16_bits(seqs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make(seqs, Shape(4, 2, 64, 16), dtype))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(7, 1, 16, 16),
        Shape(20, 1, 10, 3),
        *(
            pytest.param(shape, marks=slow)
            for shape in (Shape(4, 4), Shape(3, 1, 10, 5), Shape(2, 1, 80, 32))
        ),
    ],
    ids=str,
)
def test_groups_of_any_size(shape: Shape) -> None:
    tiling = replace(SMALL, rows=32) if shape.num_heads > 16 else SMALL
    check(make(MIXED, shape), tiling=tiling, window=30)


@pytest.mark.parametrize(
    ("window", "tiling"),
    [(40, SMALL), pytest.param(None, SMALL, marks=slow), pytest.param(None, UNSPLIT, marks=slow)],
)
def test_sinks_and_softcap(window: int | None, tiling: Tiling) -> None:
    case = make(MIXED[:3], Shape())
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(case, tiling=tiling, window=window, sinks=sinks)
    check(case, tiling=tiling, window=window, softcap=2.0)


@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("seqs", [DECODE[2:], pytest.param(MIXED, marks=slow)], ids=["decode", "mixed"])
def test_quantized_caches(seqs: list[tuple[int, int]], wire: Wire) -> None:
    case = make(seqs, Shape())
    tiles = reference_relayout.compress(case.cache, wire)
    check(case, PagedKv.of_tiles(tiles, case.cache.shape[4], case.cache.shape[5], wire), window=60)


def test_one_plane_whose_rows_are_keys_and_values() -> None:
    check(make(MIXED[1:], Shape(num_heads=4, num_kv_heads=1, planes=1)))


@pytest.mark.parametrize(
    ("seqs", "values", "wire"),
    [
        (MIXED, 20, None),
        pytest.param(DECODE, 16, None, marks=slow),
        pytest.param(DECODE, 16, "fp8", marks=slow),
    ],
)
def test_latents_whose_first_dimensions_are_values(
    seqs: list[tuple[int, int]], values: int, wire: Wire | None
) -> None:
    """More heads share a row than a tile holds, as all of them do in latent attention."""
    case = make(seqs, Shape(num_heads=12, num_kv_heads=1, planes=1))
    cache = PagedKv.of(case.cache)
    if wire is not None:
        cache = PagedKv.of_tiles(reference_relayout.compress(case.cache, wire), 4, 24, wire)
    tiling = replace(SMALL, heads=6)
    got = paged_attention(case.q, cache, LAYER, case.step, 0.3, values=values, tiling=tiling)
    want = dense(case, cache.values(), 0.3)[..., :values]
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=2e-5)


def test_is_what_the_reference_gives() -> None:
    case = make(MIXED, Shape())
    sinks = torch.ones(6, device=DEVICE)
    want = reference_attention(case.q, PagedKv.of(case.cache), LAYER, case.step, 0.3, 33, sinks, 3.0)
    got = paged_attention(
        case.q, PagedKv.of(case.cache), LAYER, case.step, 0.3, 33, sinks, softcap=3.0, tiling=SMALL
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_tiles_of_a_launch_as_chosen() -> None:
    check(make([(300, 1), (2, 1)], Shape()), tiling=None)
    assert Tiling.choose(4, 8, 64, 1, 1024, 128, 2).rows == 16
    assert Tiling.choose(24, 1, 64, 1, 1024, 128, 2).rows == 32
    assert Tiling.choose(7, 4, 2, 2000, 4096, 128, 2).rows == 128
    of_latents = Tiling.choose(128, 1, 64, 1, 1024, 512, 2)
    assert of_latents.heads == of_latents.rows == 64
    few, many = (Tiling.choose(4, 8, seqs, 1, 8192, 128, 2) for seqs in (1, 256))
    assert (few.parts, few.least) == (64, 128)
    assert (many.parts, many.least) == (4, 1024)
    assert Tiling.choose(4, 8, 256, 500, 8192, 128, 2).parts == 1  # 134 MB of sums otherwise, for each part


def test_sequences_that_only_fill_a_captured_launch_up() -> None:
    """A graph is captured for more sequences and longer contexts than a step has."""
    case = make(DECODE, Shape())
    nothing = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    more = replace(
        case.step,
        query_start=torch.cat((case.step.query_start, nothing + len(case.q))),
        lengths=torch.cat((case.step.lengths, nothing)),
        block_tables=torch.cat((case.step.block_tables, torch.zeros_like(case.step.block_tables[:2]))),
        max_length=256,
        max_queries=3,
    )
    q = torch.cat((case.q, torch.full_like(case.q[:2], torch.nan)))
    got = paged_attention(q, PagedKv.of(case.cache), LAYER, more, 0.3, tiling=SMALL)
    want = dense(case, case.cache, 0.3)
    torch.testing.assert_close(got[: len(case.q)].cpu().double(), want, rtol=2e-5, atol=2e-5)


def test_a_launch_leaves_the_counts_of_parts_as_it_found_them() -> None:
    case = make(DECODE, Shape())
    for _ in range(2):
        check(case)
    counters = attention._counters(case.q.device, 1)
    assert counters is attention._counters(case.q.device, 100)
    assert not counters.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="one program runs after another in the interpreter")
def test_parts_that_end_in_any_order_give_the_same_bits() -> None:
    """Of contexts of one part to 64, with every multiprocessor busy."""
    case = make([(1 + 67 * s, 1) for s in range(60)], Shape(8, 2, 64, 16), torch.bfloat16)
    tiling = Tiling(heads=4, rows=16, keys=32, parts=64, least=64)
    cache = PagedKv.of(case.cache)
    first = paged_attention(case.q, cache, LAYER, case.step, 0.3, tiling=tiling)
    torch.testing.assert_close(first.cpu().double(), dense(case, case.cache, 0.3), rtol=3e-2, atol=3e-2)
    for _ in range(200):
        again = paged_attention(case.q, cache, LAYER, case.step, 0.3, tiling=tiling)
        assert torch.equal(again, first)


def test_queries_may_lie_within_wider_rows() -> None:
    case = make(DECODE[2:], Shape())
    wide = torch.zeros(len(case.q), 10, 24, device=DEVICE)
    wide[:, :6] = case.q
    check(replace(case, q=wide[:, :6]))


def test_what_does_not_fit_is_said() -> None:
    case = make(DECODE, Shape())
    cache = PagedKv.of(case.cache)
    with pytest.raises(ValueError, match="5 heads of 24 do not attend"):
        paged_attention(case.q[:, :5], cache, LAYER, case.step, 1.0)
    with pytest.raises(ValueError, match="layer 2 of a cache that has 2"):
        paged_attention(case.q, cache, 2, case.step, 1.0)
    wide = make(DECODE, Shape(20, 1))
    with pytest.raises(ValueError, match="do not hold the 20 heads"):
        paged_attention(wide.q, PagedKv.of(wide.cache), LAYER, wide.step, 1.0, tiling=SMALL)
    with pytest.raises(ValueError, match="20 of 24 dimensions cannot be the values of a cache of 2 planes"):
        paged_attention(case.q, cache, LAYER, case.step, 1.0, values=20)
    with pytest.raises(ValueError, match="is not computed with"):
        paged_attention(case.q.double(), cache, LAYER, case.step, 1.0)
    with pytest.raises(ValueError, match="contiguous, of floats"):
        PagedKv.of(case.cache.transpose(3, 4))
    with pytest.raises(ValueError, match="no multiple of 4"):
        PagedKv.of_tiles(torch.zeros(1, 1, 2, 1, 4 * 14, dtype=torch.uint8), 4, 10, "int8")
