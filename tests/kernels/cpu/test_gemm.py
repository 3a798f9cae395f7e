"""The native GEMM against float64 products of what the packed forms stand for (matrix.h), for every variant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.gemm import GROUP, Rows, gemm, pack, pack_grouped, prepare_rows
from kernels.cpu.library import Library, load
from kernels.cpu.packed import PackedMatrix
from kernels.cpu.structures import Format

HERE = [name for name, variant in VARIANTS.items() if runs_here(variant)]
FORMATS = list(Format)


@pytest.fixture(params=HERE)
def library(request: pytest.FixtureRequest) -> Library:
    return load(request.param)


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def make(
    library: Library, format: Format, n: int, k: int, seed: int = 0, bias: NDArray[np.float32] | None = None
) -> tuple[PackedMatrix, NDArray[np.float64]]:
    """A packed matrix, and the weights [n, k] that it stands for."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k), np.float32)
    if format == Format.F32:
        return pack(library, format, weight, bias=bias), weight.astype(np.float64)
    if format == Format.BF16:
        bits = to_bf16(weight)
        return pack(library, format, bits, bias=bias), from_bf16(bits)
    if format == Format.I8:
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        return pack(library, format, weight, bias=bias), np.rint(weight / scale).astype(np.float64) * scale
    groups = -(-k // GROUP)
    q = rng.integers(0, 16 if format == Format.Q4 else 256, (n, k)).astype(np.uint8)
    d = (rng.random((n, groups)) * 0.1).astype(np.float16)
    m = rng.standard_normal((n, groups)).astype(np.float16) if format == Format.Q4 else None
    spread = np.repeat(d.astype(np.float64), GROUP, 1)[:, :k]
    if m is None:
        return pack_grouped(library, format, q, d, bias=bias), spread * (q.astype(np.float64) - 128)
    values = spread * q + np.repeat(m.astype(np.float64), GROUP, 1)[:, :k]
    return pack_grouped(library, format, q, d, m, bias=bias), values


def activations(rows: Rows, k: int) -> NDArray[np.float64]:
    """What prepared rows stand for, [m, k]."""
    if rows.format == Format.F32:
        return rows.data.astype(np.float64)[:, :k]
    if rows.format == Format.BF16:
        return from_bf16(rows.data)[:, :k]
    scale = rows.scale.astype(np.float64)
    return (rows.data * np.repeat(scale, rows.data.shape[1] // scale.shape[1], 1))[:, :k]


def inputs(m: int, k: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed + 1000).standard_normal((m, k), np.float32)


def allowed(rows: Rows, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Float32 sums err by the size of their terms."""
    terms = np.abs(activations(rows, weight.shape[1])) @ np.abs(weight).T
    return 2e-6 * terms + 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_products(library: Library, format: Format) -> None:
    for seed, (m, n, k) in enumerate(
        [
            (1, 64, 64),
            (3, 1, 32),
            (2, 65, 96),
            (7, 130, 576),
            (16, 64, 160),
            (33, 100, 224),
            (70, 192, 128),
            (5, 64, 1536),
            (64, 64, 2112),
        ]
    ):
        bias = inputs(1, n, seed)[0] if seed % 2 else None
        packed, weight = make(library, format, n, k, seed, bias)
        rows = prepare_rows(library, format, inputs(m, k, seed), packed.k_pad)
        out = gemm(library, packed, rows)
        expected = activations(rows, k) @ weight.T + (0 if bias is None else bias)
        assert np.all(np.abs(out[:, :n] - expected) <= allowed(rows, weight)), (m, n, k)
        assert not np.any(out[:, n:])


@pytest.mark.parametrize("format", [Format.F32, Format.BF16, Format.I8])
@pytest.mark.parametrize("k", [1, 31, 33, 63, 65, 577])
def test_any_depth(library: Library, format: Format, k: int) -> None:
    packed, weight = make(library, format, 70, k)
    rows = prepare_rows(library, format, inputs(9, k), packed.k_pad)
    expected = activations(rows, k) @ weight.T
    assert np.all(np.abs(gemm(library, packed, rows)[:, :70] - expected) <= allowed(rows, weight))


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_batch(library: Library, format: Format, tiles: bool) -> None:
    packed, _ = make(library, format, 64, 96, bias=inputs(1, 64)[0])
    rows = prepare_rows(library, format, inputs(140, 96), packed.k_pad)
    alone = np.concatenate(
        [gemm(library, packed, rows, first=i, end=i + 1, use_tiles=tiles) for i in range(140)]
    )
    for m in range(1, 71):
        for first in {0, m % 7, 140 - m}:
            together = gemm(library, packed, rows, first=first, end=first + m, use_tiles=tiles)
            assert together.tobytes() == alone[first : first + m].tobytes(), (m, first)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_deep_rows_do_not_depend_on_their_batch(library: Library, format: Format, tiles: bool) -> None:
    """Deep enough for several blocks of k, whatever their size at a number of rows."""
    packed, _ = make(library, format, 64, 2112)
    rows = prepare_rows(library, format, inputs(64, 2112), packed.k_pad)
    whole = gemm(library, packed, rows, use_tiles=tiles)
    for m in (1, 2, 3, 5, 6, 7, 12, 13, 18, 19, 31, 33, 63):
        for first in (0, 64 - m):
            part = gemm(library, packed, rows, first=first, end=first + m, use_tiles=tiles)
            assert part.tobytes() == whole[first : first + m].tobytes(), (m, first)


@pytest.mark.parametrize("format", [Format.F32, Format.I8, Format.Q8, Format.Q4])
def test_instruction_sets_agree_bitwise(format: Format) -> None:
    """Whole numbers are exact and fused multiply-adds alike; bfloat16's dot product rounds as the processor likes."""
    fused = [name for name in HERE if name != "portable"]
    if len(fused) < 2:
        pytest.skip("one instruction set here")
    results = set()
    for name in fused:
        library = load(name)
        packed, _ = make(library, format, 128, 576)
        rows = prepare_rows(library, format, inputs(37, 576), packed.k_pad, norm=inputs(1, 576)[0], eps=1e-5)
        results.add(gemm(library, packed, rows).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("m", [1, 5, 16, 17, 31, 32, 47, 64])
def test_tiles(m: int) -> None:
    """Whole numbers agree with the other kernel to the bit, bfloat16 but for the order of its roundings."""
    library = load("amx" if "amx" in HERE else "amx_soft") if {"amx", "amx_soft"} & set(HERE) else None
    if library is None or not library.cdll.hr_amx_enable():
        pytest.skip("no tiles here")
    for format in (Format.I8, Format.BF16):
        packed, weight = make(library, format, 192, 320)
        rows = prepare_rows(library, format, inputs(m, 320), packed.k_pad)
        by_tiles, by_lanes = (gemm(library, packed, rows, use_tiles=tiles) for tiles in (True, False))
        if format == Format.I8:
            assert by_tiles.tobytes() == by_lanes.tobytes()
        assert np.all(np.abs(by_tiles - by_lanes) <= allowed(rows, weight))


@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_infinity_stay_in_their_row(library: Library, format: Format) -> None:
    packed, _ = make(library, format, 64, 128)
    x = inputs(20, 128)
    clean = gemm(library, packed, prepare_rows(library, format, x, packed.k_pad))
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[7, 40] = bad
        out = gemm(library, packed, prepare_rows(library, format, spoilt, packed.k_pad))
        assert not np.any(np.isfinite(out[7]))
        assert np.delete(out, 7, 0).tobytes() == np.delete(clean, 7, 0).tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_zero_rows_and_extremes(library: Library, format: Format) -> None:
    packed, weight = make(library, format, 64, 64)
    x = np.zeros((4, 64), np.float32)
    x[1], x[2] = 1e-40, 1e30  # too small to scale; large
    x[3, 5] = -3.0
    rows = prepare_rows(library, format, x, packed.k_pad)
    out = gemm(library, packed, rows)
    assert not np.any(out[0])
    assert np.all(np.isfinite(out))
    expected = activations(rows, 64) @ weight.T
    assert np.all(np.abs(out - expected) <= allowed(rows, weight))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [1, 15, 48, 64, 100, 576])
def test_prepare_rows(library: Library, format: Format, k: int) -> None:
    k_pad = -(-k // 64) * 64
    x, norm = inputs(5, k) * 3, inputs(1, k, 2)[0]
    wide = np.full((5, k + 3), np.nan, np.float32)  # rows with a stride, and something bad behind them
    wide[:, :k] = x
    normed = torch.nn.functional.rms_norm(torch.from_numpy(x), (k,), torch.from_numpy(norm), 1e-5).numpy()
    for expected, given in ((x, None), (normed, norm)):
        rows = prepare_rows(library, format, wide[:, :k], k_pad, norm=given, eps=1e-5)
        assert not np.any(rows.data[:, k:])
        got = activations(rows, k)
        if format == Format.F32:
            step = 2e-6 * np.abs(expected)
        elif format == Format.BF16:
            step = np.abs(expected) / 256
        else:
            assert np.array_equal(
                rows.sum,
                rows.data.reshape(5, rows.sum.shape[1], -1).sum(2, dtype=np.int32).astype(np.float32),
            )
            assert np.abs(rows.data).max() == 127
            step = 0.50001 * np.repeat(rows.scale, k_pad // rows.scale.shape[1], 1)[:, :k]
        assert np.all(np.abs(got - expected) <= step + 1e-6)


def test_bf16_rounds_as_torch_does(library: Library) -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (8, 64), np.uint32).view(np.float32)
    x[np.abs(x) < 1.2e-38] = 0.0  # AVX512_BF16 flushes subnormals
    rows = prepare_rows(library, Format.BF16, x, 64)
    nan = np.isnan(x)
    assert np.array_equal(rows.data[~nan], to_bf16(x)[~nan])
    assert np.all(np.isnan(from_bf16(rows.data)[nan]))
