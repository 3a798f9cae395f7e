"""Packed panels hold what was put in, where matrix.h says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.gemm import gemm, pack, pack_grouped, panel_bytes, prepare_rows, unpack_rows
from kernels.cpu.library import Library, load
from kernels.cpu.structures import Format


@pytest.fixture(params=[name for name, variant in VARIANTS.items() if runs_here(variant)])
def library(request: pytest.FixtureRequest) -> Library:
    return load(request.param)


RNG = np.random.default_rng(5)


def grouped(format: Format, n: int, k: int) -> tuple[NDArray, NDArray, NDArray | None, NDArray[np.float32]]:
    """q, d, m and the weights that they stand for."""
    q = RNG.integers(0, 16 if format == Format.Q4 else 256, (n, k)).astype(np.uint8)
    d = RNG.standard_normal((n, k // 32)).astype(np.float16)
    m = RNG.standard_normal((n, k // 32)).astype(np.float16) if format == Format.Q4 else None
    wide = np.repeat(d, 32, 1).astype(np.float32)
    if m is None:
        return q, d, m, wide * (q.astype(np.float32) - 128)
    return q, d, m, wide * q + np.repeat(m, 32, 1).astype(np.float32)


@pytest.mark.parametrize("k", [1, 31, 64, 65, 200])
@pytest.mark.parametrize("n", [1, 64, 130])
def test_floats_come_back(library: Library, n: int, k: int) -> None:
    weight = RNG.standard_normal((n, k + 5), np.float32)[:, :k]  # rows with a stride
    packed = pack(library, Format.F32, weight)
    assert np.array_equal(unpack_rows(library, packed, np.arange(n)), weight)
    as_bf16 = RNG.integers(0, 0x7F80, (n, k)).astype(np.uint16)
    packed = pack(library, Format.BF16, as_bf16)
    expected = (as_bf16.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(unpack_rows(library, packed, np.arange(n)), expected)


def test_i8_rounds_to_the_nearest(library: Library) -> None:
    weight = RNG.standard_normal((70, 100), np.float32)
    weight[3] = 0
    packed = pack(library, Format.I8, weight)
    assert packed.scale is not None
    assert np.array_equal(packed.scale[:70], np.abs(weight).max(1) / np.float32(127))
    assert not np.any(packed.scale[70:])
    back = unpack_rows(library, packed, np.arange(70))
    assert np.all(np.abs(back - weight) <= packed.scale[:70, None] * 0.50001)
    assert np.all(np.abs(back).max(1) == packed.scale[:70] * 127)


def test_a_weight_that_is_not_finite_spoils_its_feature_only(library: Library) -> None:
    weight = RNG.standard_normal((64, 64), np.float32)
    weight[5, 3], weight[9, 9] = np.nan, np.inf
    out = gemm(
        library, packed := pack(library, Format.I8, weight), prepare_rows(library, Format.I8, weight[:2], 64)
    )
    assert np.isnan(packed.scale[[5, 9]]).all()
    assert sorted(set(np.nonzero(np.isnan(out))[1])) == [5, 9]


@pytest.mark.parametrize("format", [Format.Q8, Format.Q4])
@pytest.mark.parametrize("k", [32, 64, 96, 576])
def test_groups_come_back(library: Library, format: Format, k: int) -> None:
    q, d, m, weight = grouped(format, 70, k)
    packed = pack_grouped(library, format, q, d, m)
    assert np.allclose(unpack_rows(library, packed, np.arange(70)), weight, rtol=1e-6, atol=1e-6)


def test_the_layout_is_the_documented_one(library: Library) -> None:
    """Bytes are part of the interface: packed models are kept on disk."""
    weight = RNG.standard_normal((64, 64), np.float32)
    packed = pack(library, Format.F32, weight)
    assert np.array_equal(packed.data.view(np.float32).reshape(64, 64), weight.T)
    bits = RNG.integers(0, 0x7F80, (64, 64)).astype(np.uint16)
    packed = pack(library, Format.BF16, bits)
    assert np.array_equal(
        packed.data.view(np.uint16).reshape(32, 64, 2), bits.T.reshape(32, 2, 64).swapaxes(1, 2)
    )
    q, d, m, _ = grouped(Format.Q4, 64, 64)
    group = pack_grouped(library, Format.Q4, q, d, m).data.reshape(2, 1280)[1]
    assert m is not None
    assert np.array_equal(group[:128].view(np.float16), d[:, 1])
    assert np.array_equal(group[128:256].view(np.float16), m[:, 1])
    nibbles = group[256:].reshape(4, 64, 4).swapaxes(0, 1).reshape(64, 16)
    assert np.array_equal(nibbles & 15, q[:, 32:48])
    assert np.array_equal(nibbles >> 4, q[:, 48:])
    q, d, _, _ = grouped(Format.Q8, 64, 64)
    group = pack_grouped(library, Format.Q8, q, d).data.reshape(2, 2176)[0]
    assert np.array_equal(group[:128].view(np.float16), d[:, 0])
    assert np.array_equal(group[128:].reshape(8, 64, 4).swapaxes(0, 1).reshape(64, 32), q[:, :32])


@pytest.mark.parametrize("format", list(Format))
def test_rows_may_be_permuted_and_left_out(library: Library, format: Format) -> None:
    rows = np.array([5, -1, 0, *RNG.integers(-1, 70, 97)], np.int32)
    if format in (Format.Q8, Format.Q4):
        q, d, m, _ = grouped(format, 70, 96)
        plain, moved = (pack_grouped(library, format, q, d, m, rows=r) for r in (None, rows))
    else:
        weight = RNG.standard_normal((70, 96), np.float32)
        source = (weight.view(np.uint32) >> 16).astype(np.uint16) if format == Format.BF16 else weight
        plain, moved = (pack(library, format, source, rows=r) for r in (None, rows))
    assert moved.n == 100
    got = unpack_rows(library, moved, np.arange(100))
    expected = unpack_rows(library, plain, np.maximum(rows, 0)) * (rows >= 0)[:, None]
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("format", list(Format))
def test_threads_pack_the_same(library: Library, format: Format) -> None:
    if format in (Format.Q8, Format.Q4):
        q, d, m, _ = grouped(format, 300, 64)
        packed = [pack_grouped(library, format, q, d, m, threads=t) for t in (1, 3)]
    else:
        weight = RNG.standard_normal((300, 64), np.float32)
        source = (weight.view(np.uint32) >> 16).astype(np.uint16) if format == Format.BF16 else weight
        packed = [pack(library, format, source, threads=t) for t in (1, 3)]
    assert packed[0].data.tobytes() == packed[1].data.tobytes()
    assert packed[0].data.nbytes == 5 * panel_bytes(format, 64)


def test_wrong_arrays_are_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="wants contiguous rows of uint16"):
        pack(library, Format.BF16, np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_grouped(library, Format.Q8, np.zeros((4, 40), np.uint8), np.zeros((4, 1), np.float16))
    with pytest.raises(ValueError, match="pack_grouped"):
        pack(library, Format.Q4, np.zeros((4, 32), np.float32))
