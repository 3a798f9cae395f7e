"""KV blocks between caches of different layouts, in numpy: what serves where the native library cannot be built.

The wire's compressed form of a block is canonical tiles [layer, k|v, head], each num_tokens * head_dim bytes of values
followed by num_tokens float32 scales. One row (head_dim values of one token) has one scale:

    int8  scale = amax / 127, q = round(x * (127 / amax)); the tiles of the native int8 cache, bit for bit
    fp8   scale = amax / 448, q = float8 e4m3fn of x * (448 / amax)

all in float32, rounded to nearest even, and x is q * scale again. A row whose amax is not above 1e-30 has the scale 0
and comes back as zeros. A row that holds an infinity or a NaN has the scale NaN and the values 0, and so comes back as
NaN throughout: it cannot pass for a finite one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kernels.cache_view import CacheView

Dtype = Literal["float32", "bfloat16", "float16"]
Wire = Literal["int8", "fp8"]
BlockIds = Sequence[int] | NDArray[np.integer]

ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_AMAX = np.float32(1e-30)  # below, LARGEST / amax would overflow


def wire_block_bytes(num_layers: int, num_heads: int, num_tokens: int, head_dim: int) -> int:
    """Of one compressed block, in either form."""
    return num_layers * 2 * num_heads * num_tokens * (head_dim + 4)


def copy_blocks(
    destination: CacheView,
    destination_blocks: NDArray[np.int64],
    source: CacheView,
    source_blocks: NDArray[np.int64],
) -> None:
    to, of = rows_of(destination), rows_of(source)
    for i, j in zip(destination_blocks, source_blocks, strict=True):
        to[i] = of[j]


def compress_blocks(
    out: NDArray[np.uint8], source: CacheView, source_blocks: NDArray[np.int64], dtype: Dtype, wire: Wire
) -> None:
    """`out` [n, block bytes]."""
    rows = rows_of(source)
    dim = source.row_bytes // ITEM_BYTES[dtype]
    values, scales = _tiles(out, source, dim)
    for i, block in enumerate(source_blocks):
        x = _widen(np.ascontiguousarray(rows[block]), dtype)
        amax = np.abs(x).max(-1, keepdims=True)
        with np.errstate(all="ignore"):
            finite, some = np.isfinite(amax), amax > _SMALLEST_AMAX
            scale = np.where(some, amax / np.float32(LARGEST[wire]), np.float32(0))
            y = np.where(finite & some, x * (np.float32(LARGEST[wire]) / amax), np.float32(0))
        scales[i] = (
            np.where(finite, scale, np.float32(np.nan))[..., 0].view(np.uint8).reshape(scales[i].shape)
        )
        values[i] = np.rint(y).astype(np.int8).view(np.uint8) if wire == "int8" else _to_e4m3(y)


def restore_blocks(
    destination: CacheView,
    destination_blocks: NDArray[np.int64],
    wire_bytes: NDArray[np.uint8],
    dtype: Dtype,
    wire: Wire,
) -> None:
    """`wire_bytes` [n, block bytes]."""
    rows = rows_of(destination)
    dim = destination.row_bytes // ITEM_BYTES[dtype]
    values, scales = _tiles(wire_bytes, destination, dim)
    for i, block in enumerate(destination_blocks):
        q = values[i].view(np.int8).astype(np.float32) if wire == "int8" else _from_e4m3(values[i])
        with np.errstate(all="ignore"):
            x = q * np.ascontiguousarray(scales[i]).view(np.float32)
            rows[block] = _narrow(x, dtype)


def rows_of(view: CacheView) -> NDArray[np.uint8]:
    """The view's memory as an array [num_blocks, num_layers, 2, num_heads, num_tokens, row_bytes]."""
    return np.asarray(_Memory(view))


def checked_ids(blocks: BlockIds | Iterable[int], view: CacheView, name: str) -> NDArray[np.int64]:
    """Contiguous. Raises ValueError for one that the view has not."""
    ids = np.asarray(blocks if isinstance(blocks, np.ndarray) else list(blocks))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"the {name} blocks are one list of whole numbers, not {ids.dtype} {ids.shape}")
    if ids.size and not 0 <= ids.min() <= ids.max() < view.num_blocks:
        raise ValueError(
            f"the {name} blocks are of 0 to {view.num_blocks - 1}; among them are {ids.min()} to {ids.max()}"
        )
    return np.ascontiguousarray(ids, np.int64)


class _Memory:
    def __init__(self, view: CacheView) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "data": (view.address, False),
            "shape": (view.num_blocks, view.num_layers, 2, view.num_heads, view.num_tokens, view.row_bytes),
            "strides": (
                view.block_stride,
                view.layer_stride,
                view.kv_stride,
                view.head_stride,
                view.token_stride,
                1,
            ),
        }


def _tiles(
    blocks: NDArray[np.uint8], view: CacheView, dim: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Views of the values [n, layers, 2, heads, tokens, dim] and of the scales' bytes [n, layers, 2, heads, tokens, 4]."""
    tokens = view.num_tokens
    lead = (len(blocks), view.num_layers, 2, view.num_heads)
    tiles = blocks.reshape(*lead, tokens * (dim + 4))
    values, scales = tiles[..., : tokens * dim], tiles[..., tokens * dim :]
    return _split(values, dim), _split(scales, 4)


def _split(array: NDArray[np.uint8], last: int) -> NDArray[np.uint8]:
    """The last dimension as two, without a copy."""
    shape = (*array.shape[:-1], array.shape[-1] // last, last)
    split: NDArray[np.uint8] = np.lib.stride_tricks.as_strided(
        array, shape, (*array.strides[:-1], last, 1), writeable=array.flags.writeable
    )
    return split


def _widen(rows: NDArray[np.uint8], dtype: Dtype) -> NDArray[np.float32]:
    if dtype == "float32":
        return rows.view(np.float32)
    if dtype == "float16":
        return rows.view(np.float16).astype(np.float32)
    return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrow(x: NDArray[np.float32], dtype: Dtype) -> NDArray[np.uint8]:
    if dtype == "float32":
        return x.view(np.uint8)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint8)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).view(np.uint8)


def _to_e4m3(y: NDArray[np.float32]) -> NDArray[np.uint8]:
    """|y| at most a little above 448."""
    bits = y.view(np.uint32)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
    # Steps of 2^-9 below 2^-6: they are the last bits of what is added to 2^14.
    small = (size.view(np.float32) + np.float32(16384)).view(np.uint32) - 0x46800000
    out: NDArray[np.uint8] = (np.where(size < 121 << 23, small, normal) | (bits >> 24 & 0x80)).astype(
        np.uint8
    )
    return out


def _from_e4m3(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _E4M3[values]


def _e4m3_values() -> NDArray[np.float32]:
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[127] = np.nan
    return np.concatenate((size, -size)).astype(np.float32)


_E4M3 = _e4m3_values()
