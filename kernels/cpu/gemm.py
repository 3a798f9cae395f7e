"""Single matrix operations of the native library: packing weights when a model is loaded, and what tests call.

bfloat16 is uint16 here: numpy has no such type. A decoder's step does not pass through this file; see decoder.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.cpu.layout import DEPTH, PANEL, round_up
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedMatrix
from kernels.cpu.structures import Format, Matrix

GROUP = 32  # inputs that share a scale in Q8 and Q4: matrix.h
_ALIGNMENT = 64
_ELEMENT = {
    Format.F32: np.float32,
    Format.BF16: np.uint16,
    Format.I8: np.int8,
    Format.Q8: np.int8,
    Format.Q4: np.int8,
}


class _Activations(ctypes.Structure):
    _fields_ = (
        ("format", c_int),
        ("k_pad", c_int),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("sum", c_void_p),
    )


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations in the form that a weight format wants: matrix.h."""

    format: Format
    data: NDArray[np.generic]  # [m, k_pad]
    scale: NDArray[np.float32]  # [m, 1] for I8, [m, k_pad / 32] for Q8 and Q4, else [m, 0]
    sum: NDArray[np.float32]  # as scale

    def struct(self) -> _Activations:
        return _Activations(
            format=int(self.format),
            k_pad=self.data.shape[1],
            data=self.data.ctypes.data,
            scale=self.scale.ctypes.data,
            sum=self.sum.ctypes.data,
        )


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """As np.empty, on a cache line."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def panel_bytes(format: Format, k_pad: int) -> int:
    """Of one panel of 64 features: matrix.h."""
    per_group = {Format.F32: 8192, Format.BF16: 4096, Format.I8: 2048, Format.Q8: 2176, Format.Q4: 1280}
    return k_pad // GROUP * per_group[format]


def pack(
    library: Library,
    format: Format,
    weight: NDArray[Any],
    *,
    rows: NDArray[np.int32] | None = None,
    bias: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> PackedMatrix:
    """Pack `weight` [n, k]: uint16 (bfloat16 bits) for BF16, else float32; rows may be strided. I8 is quantized here.

    `rows`, when given, says which source row becomes each feature (-1: zeros); there are then len(rows) features, and
    `bias` belongs to these. Raises ValueError.
    """
    wanted = np.uint16 if format == Format.BF16 else np.float32
    if format not in (Format.F32, Format.BF16, Format.I8):
        raise ValueError(f"{format.name} is packed from integers and their scales: pack_grouped")
    if weight.ndim != 2 or weight.dtype != wanted or weight.strides[1] != weight.itemsize:
        raise ValueError(
            f"{format.name} wants contiguous rows of {wanted.__name__}, got {weight.dtype} {weight.shape}"
        )
    k = weight.shape[1]
    packed = allocate(format, weight.shape[0], k, rows, bias)
    arguments = [_address(weight), c_int64(weight.strides[0] // weight.itemsize), k, packed.k_pad]
    tail = [_address(packed.data)] + ([_address(packed.scale)] if format == Format.I8 else [])
    function = getattr(library.cdll, f"hr_pack_{format.name.lower()}")
    _over_panels(function, arguments, packed, rows, weight.shape[0], tail, threads)
    return packed


def pack_grouped(
    library: Library,
    format: Format,
    q: NDArray[np.uint8],
    d: NDArray[np.float16],
    m: NDArray[np.float16] | None = None,
    *,
    rows: NDArray[np.int32] | None = None,
    bias: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> PackedMatrix:
    """Pack integers [n, k] with a scale `d` (and for Q4 a minimum `m`) [n, k / 32]: d * (q - 128), or d * q + m."""
    n, k = q.shape
    scales = (n, k // GROUP)
    if k % GROUP or d.shape != scales or (format == Format.Q4) != (m is not None):
        raise ValueError(
            f"q {q.shape}, d {d.shape}: k must be a multiple of {GROUP}, d (and Q4's m) be {scales}"
        )
    for array, dtype in ((q, np.uint8), (d, np.float16), (m, np.float16)):
        if array is not None and (array.dtype != dtype or not array.flags.c_contiguous):
            raise ValueError(f"wants contiguous {np.dtype(dtype)}, got {array.dtype} {array.strides}")
    packed = allocate(format, n, k, rows, bias)
    arguments = [int(format), _address(q), _address(d), _address(m), k, packed.k_pad]
    _over_panels(library.cdll.hr_pack_grouped, arguments, packed, rows, n, [_address(packed.data)], threads)
    return packed


def unpack_rows(library: Library, matrix: PackedMatrix, features: NDArray[np.int32]) -> NDArray[np.float32]:
    """[len(features), k]: these features' weights, dequantized."""
    out = aligned_empty((len(features), matrix.k), np.float32)
    features = np.ascontiguousarray(features, np.int32)
    library.cdll.hr_unpack_rows(byref(matrix.struct()), _address(features), len(features), _address(out))
    return out


def prepare_rows(
    library: Library,
    format: Format,
    x: NDArray[np.float32],
    k_pad: int,
    *,
    norm: NDArray[np.float32] | None = None,
    eps: float = 0.0,
) -> Rows:
    """`x` [m, k] as `format` wants it; with `norm` [k], after an RMS norm with these weights."""
    m, k = x.shape
    scales = {Format.I8: 1, Format.Q8: k_pad // GROUP, Format.Q4: k_pad // GROUP}.get(format, 0)
    rows = Rows(
        format,
        aligned_empty((m, k_pad), _ELEMENT[format]),
        aligned_empty((m, scales), np.float32),
        aligned_empty((m, scales), np.float32),
    )
    function = library.cdll.hr_prepare_rows
    stride = c_int64(x.strides[0] // x.itemsize)
    function(_address(x), stride, k, _address(norm), c_float(eps), 0, m, byref(rows.struct()))
    return rows


def gemm(
    library: Library,
    matrix: PackedMatrix,
    x: Rows,
    *,
    first: int = 0,
    end: int | None = None,
    use_tiles: bool = True,
) -> NDArray[np.float32]:
    """Rows [first, end) of x times W transposed, with the bias: [end - first, n_pad]."""
    end = x.data.shape[0] if end is None else end
    out = aligned_empty((end - first, matrix.n_pad), np.float32)
    function = library.cdll.hr_gemm
    function.argtypes = [POINTER(Matrix), POINTER(_Activations), c_int, c_int, c_void_p, c_int64, c_int]
    function(matrix.struct(), x.struct(), first, end, out.ctypes.data, matrix.n_pad, int(use_tiles))
    return out


def allocate(
    format: Format, n: int, k: int, rows: NDArray[np.int32] | None, bias: NDArray[np.float32] | None
) -> PackedMatrix:
    """Room for a matrix [n, k], or of len(rows) features, with its padded bias; data and scale are to be filled."""
    n = n if rows is None else len(rows)
    n_pad, k_pad = round_up(n, PANEL), round_up(k, DEPTH)
    padded_bias = None
    if bias is not None:
        padded_bias = aligned_empty((n_pad,), np.float32)
        padded_bias[:n], padded_bias[n:] = bias, 0.0
    return PackedMatrix(
        format=format,
        n=n,
        k=k,
        data=aligned_empty((n_pad // PANEL * panel_bytes(format, k_pad),), np.uint8),
        scale=aligned_empty((n_pad,), np.float32) if format == Format.I8 else None,
        bias=padded_bias,
    )


def _over_panels(
    function: Callable[..., object],
    arguments: list[Any],
    packed: PackedMatrix,
    rows: NDArray[np.int32] | None,
    n: int,
    tail: list[Any],
    threads: int,
) -> None:
    panels = packed.n_pad // PANEL
    if rows is not None:
        padded = np.full(packed.n_pad, -1, np.int32)
        padded[: len(rows)] = rows
        rows = padded
    cuts = [panels * i // threads for i in range(threads + 1)]

    def run(begin: int, end: int) -> None:
        function(*arguments, _address(rows), n, begin, end, *tail)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, cuts, cuts[1:]))


def _address(array: NDArray[Any] | None) -> c_void_p | None:
    return None if array is None else c_void_p(array.ctypes.data)
