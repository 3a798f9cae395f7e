"""The native attention against the eager oracle in float64, for every variant; bits across batches and chunks."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.attention import PagedCache, attend, norm_rotate, split_keys, supports, write_kv
from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.library import Library, load
from kernels.cpu.structures import KvType
from kernels.paged_kv import PagedKv

HERE = [name for name, variant in VARIANTS.items() if runs_here(variant)]
TYPES = list(KvType)
# Largest error against float64 over the same cache, as a fraction of the largest |v|: float32 sums; probabilities in
# bfloat16 (relative 2^-9 each, mostly cancelling); queries and probabilities in 16-bit integers.
ERROR = {KvType.F32: 3e-6, KvType.BF16: 2.0**-8, KvType.I8: 2e-4}
Step = list[tuple[int, int]]  # (context length, query tokens) of each sequence


@pytest.fixture(params=HERE)
def library(request: pytest.FixtureRequest) -> Library:
    return load(request.param)


@dataclass(frozen=True)
class Case:
    """A step over a cache with scattered block tables, filled by the native write."""

    cache: PagedCache
    q: Tensor  # float32 [T, num_heads, D], values that bfloat16 has
    step: Step
    tables: list[list[int]]
    layer: int

    @property
    def query_start(self) -> list[int]:
        return [0, *itertools.accumulate(rows for _, rows in self.step)]

    @property
    def lengths(self) -> list[int]:
        return [length for length, _ in self.step]

    def native(self, library: Library, window: int | None = None, **options: object) -> Tensor:
        scale = self.cache.head_dim**-0.5
        return attend(
            library,
            self.q,
            self.cache,
            self.layer,
            self.query_start,
            self.lengths,
            self.tables,
            scale,
            window,
            **options,
        )

    def expected(self, window: int | None = None) -> Tensor:
        tables = torch.zeros((len(self.step), max(map(len, self.tables))), dtype=torch.int64)
        for row, table in zip(tables, self.tables, strict=True):
            row[: len(table)] = torch.tensor(table)
        step = reference.AttentionStep.of(
            self.query_start, self.lengths, tables, torch.zeros(len(self.q), dtype=torch.int64)
        )
        kv = self.cache.values().double()
        scale = self.cache.head_dim**-0.5
        return reference.paged_attention(self.q.double(), PagedKv.of(kv), self.layer, step, scale, window)

    def check(
        self, library: Library, window: int | None = None, slack: float = 0.0, **options: object
    ) -> None:
        found = self.native(library, window, **options)
        error = (found.double() - self.expected(window)).abs().max().item()
        assert error <= (ERROR[self.cache.type] + slack) * self.cache.values()[:, :, 1].abs().max().item()


def make(
    library: Library,
    type: KvType,
    step: Step,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length, _ in step]
    blocks = list(range(sum(needed) + 2))
    random.Random(seed).shuffle(blocks)
    ends = list(itertools.accumulate(needed, initial=0))
    tables = [blocks[a:b] for a, b in itertools.pairwise(ends)]
    layers, layer = 2, seed % 2
    cache = PagedCache.new(type, len(blocks), layers, kv_heads, block_size, head_dim)
    for table, (length, _) in zip(tables, step, strict=True):
        slots = torch.tensor(table).repeat_interleave(block_size) * block_size
        slots = (slots + torch.arange(block_size).repeat(len(table)))[:length]
        k, v = torch.randn((2, length, kv_heads, head_dim), generator=generator)
        write_kv(library, cache, layer, 2 * k, v, slots)
    tokens = sum(rows for _, rows in step)
    q = torch.randn((tokens, heads, head_dim), generator=generator).bfloat16().float()
    return Case(cache, q, step, tables, layer)


def test_supports(library: Library) -> None:
    assert all(supports(library, d, b) for d in (16, 64, 80, 256) for b in (1, 8, 16, 256))
    assert not any(supports(library, d, 16) for d in (0, 8, 24, 100, 272))
    assert not supports(library, 64, 0)
    assert not supports(library, 64, 257)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_decode_of_every_length(library: Library, type: KvType, block_size: int) -> None:
    lengths = [1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 511, 513, 700]
    make(library, type, [(n, 1) for n in lengths], 9, 3, 64, block_size).check(library)


@pytest.mark.parametrize("type", TYPES)
def test_long_contexts(library: Library, type: KvType) -> None:
    step = [(2047, 1), (2048, 1), (2049, 1), (2100, 3), (4097, 1), (4100, 5)]
    case = make(library, type, step, 3, 1, 32, 16)
    case.check(library)
    case.check(library, split=True)
    case.check(library, window=2060, split=True)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 160, 256])
def test_head_dims(library: Library, type: KvType, head_dim: int) -> None:
    make(library, type, [(300, 7), (40, 1)], 4, 2, head_dim, 16, seed=head_dim // 16).check(library)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_groups(library: Library, type: KvType, group: int) -> None:
    case = make(library, type, [(70, 1), (129, 60), (20, 20)], 2 * group, 2, 64, 16, seed=group)
    case.check(library)
    case.check(library, out_dtype=torch.float32, item_rows=1)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("window", [1, 2, 16, 17, 100, 256, 300, 10_000])
def test_windows(library: Library, type: KvType, window: int) -> None:
    make(library, type, [(600, 1), (520, 300), (3, 3), (258, 2)], 6, 2, 32, 16).check(library, window)


@pytest.mark.parametrize("type", TYPES)
def test_prefill(library: Library, type: KvType) -> None:
    make(library, type, [(1, 1), (17, 17), (700, 500), (256, 256)], 9, 3, 64, 16).check(library)


def test_output_in_bfloat16(library: Library) -> None:
    case = make(library, KvType.BF16, [(100, 20), (9, 1)], 9, 3, 64, 16)
    exact, rounded = case.native(library), case.native(library, out_dtype=torch.bfloat16)
    assert torch.equal(exact.bfloat16(), rounded)


@pytest.mark.parametrize("type", TYPES)
def test_scores_far_apart(library: Library, type: KvType) -> None:
    """Probabilities that underflow. Errors of scores, which grow with these, become relative errors of p."""
    case = make(library, type, [(800, 1), (800, 100)], 2, 1, 32, 16)
    relative = 2.0**-16 if type == KvType.I8 else 2.0**-21  # of a product of query and key
    for factor in (30.0, 1000.0):
        far = replace(case, q=(case.q * factor).bfloat16().float())
        keys = case.cache.values()[:, case.layer, 0].abs().amax()
        largest = (32**-0.5 * far.q.abs().sum(-1).amax() * keys).item()
        far.check(library, slack=math.expm1(2 * largest * relative))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-28, 1e-14])
def test_a_query_of_zeros_sees_its_own_context_alike(library: Library, type: KvType, size: float) -> None:
    """All that it may see, and nothing behind it."""
    case = make(library, type, [(300, 40), (21, 1), (33, 33)], 4, 2, 64, 16)
    zeros = replace(case, q=(case.q * size).bfloat16().float())
    zeros.check(library)
    zeros.check(library, window=20)


@pytest.mark.parametrize("type", TYPES)
def test_stale_slots_do_not_matter(library: Library, type: KvType) -> None:
    """What a block held before: not even NaN behind the context may be seen."""
    case = make(library, type, [(21, 1), (37, 9)], 3, 1, 64, 16)
    before = case.native(library)
    for (length, _), table in zip(case.step, case.tables, strict=True):
        item = case.cache.data.view(torch.uint8)
        used = length % 16 * case.cache.head_dim * (item.shape[-1] // (16 * case.cache.head_dim))
        end = 16 * case.cache.head_dim if type == KvType.I8 else item.shape[-1]
        item[table[-1], ..., used:end] = 0xFF
    assert torch.equal(case.native(library), before)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 2), (16, 2), (2, 2)])
def test_bits_do_not_depend_on_the_batch(
    library: Library, type: KvType, window: int | None, heads: int, kv_heads: int
) -> None:
    """Each query token alone, with others, in chunks of any size, in any company: the same bits."""
    length = 390
    case = make(library, type, [(length, length)], heads, kv_heads, 64, 16, seed=heads)
    whole = case.native(library, window)
    for item_rows in (1, 5, 16):
        assert torch.equal(case.native(library, window, item_rows=item_rows), whole)
    scale = case.cache.head_dim**-0.5
    positions = [0, 1, 15, 16, 17, 100, 255, 256, 257, length - 1]
    alone = attend(
        library,
        case.q[positions],
        case.cache,
        case.layer,
        range(len(positions) + 1),
        [p + 1 for p in positions],
        [case.tables[0]] * len(positions),
        scale,
        window,
    )
    assert torch.equal(alone, whole[positions])
    bounds = [0, 1, 33, 50, 250, 300, length]
    order = [4, 0, 5, 2, 1, 3]
    chunks = [case.q[bounds[i] : bounds[i + 1]] for i in order]
    mixed = attend(
        library,
        torch.cat(chunks),
        case.cache,
        case.layer,
        [0, *itertools.accumulate(map(len, chunks))],
        [bounds[i + 1] for i in order],
        case.tables * len(order),
        scale,
        window,
    )
    assert torch.equal(mixed, torch.cat([whole[bounds[i] : bounds[i + 1]] for i in order]))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("window", [None, 100, 2500])
def test_parts_add_up_to_the_same_bits(library: Library, type: KvType, window: int | None) -> None:
    parts = split_keys(library)
    step = [(parts, 3), (parts + 1, 2), (parts + 40, 60), (2 * parts + 300, 1), (50, 2)]
    case = make(library, type, step, 3, 1, 16, 16)
    assert torch.equal(case.native(library, window, split=True), case.native(library, window))


def test_int8_error_against_float(library: Library) -> None:
    """Bound from the quantization of keys and values to absmax / 127: half a step each.

    A score errs by at most eps = scale * sum |q| * max |k| / 254, a probability by e^(2 eps) - 1, relatively.
    """
    step = [(300, 1), (80, 80)]
    exact = make(library, KvType.F32, step, 6, 2, 64, 16)
    quantized = make(library, KvType.I8, step, 6, 2, 64, 16)
    assert torch.equal(exact.q, quantized.q)
    values = exact.cache.values()[:, exact.layer]
    keys, values = values[:, 0].abs().amax(), values[:, 1].abs().amax()
    eps = (64**-0.5 * exact.q.abs().sum(-1) * keys / 254).amax().item()
    error = (quantized.native(library) - exact.expected().float()).abs().max().item()
    assert error <= values * (math.expm1(2 * eps) + 1 / 254)
    assert error <= 0.1 * values  # what to expect: errors of 64 dimensions mostly cancel


@pytest.mark.parametrize("type", TYPES)
def test_write(library: Library, type: KvType) -> None:
    cache = PagedCache.new(type, 5, 2, 3, 8, 48)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn((2, 7, 3, 48), generator=generator)
    v[3] = 0
    slots = torch.tensor([3, 39, 8, 17, 0, 16, 15])
    write_kv(library, cache, 1, k, v, slots)
    expected = torch.zeros((5, 2, 2, 3, 8, 48))
    reference.write_kv(expected, 1, k, v, slots)
    found = cache.values()
    if type == KvType.F32:
        assert torch.equal(found, expected)
    elif type == KvType.BF16:
        assert torch.equal(found, expected.bfloat16().float())
    else:
        assert ((found - expected).abs() <= expected.abs().amax(-1, keepdim=True) / 253).all()


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_norm_and_rotation(library: Library, head_dim: int, normed: bool) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn((5, 3, head_dim), generator=generator)
    angles = 100 * torch.rand((5, head_dim // 2), generator=generator)
    weight = torch.randn(head_dim, generator=generator) if normed else None
    expected = x if weight is None else reference.rms_norm(x, weight, 1e-5)
    expected = reference.apply_rope(expected.double(), angles.cos().double(), angles.sin().double())
    norm_rotate(library, x, angles.cos(), angles.sin(), weight, 1e-5)
    torch.testing.assert_close(x.double(), expected, rtol=2e-6, atol=2e-6)
