"""KV blocks between caches of different layouts, by the native library; in numpy where there is none.

The calls take addresses: who calls keeps the memory alive, and other threads run meanwhile. What the compressed form
holds is written down in kernels/relayout.py.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_int32, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from kernels import relayout
from kernels.cache_view import CacheView
from kernels.cpu import structures
from kernels.cpu.build import BuildError
from kernels.cpu.library import Library, load
from kernels.cpu.structures import RowType, WireType
from kernels.relayout import BlockIds, Dtype, Wire, checked_ids, wire_block_bytes

__all__ = [
    "BlockIds",
    "Dtype",
    "Wire",
    "compress_blocks",
    "copy_blocks",
    "restore_blocks",
    "wire_block_bytes",
]

_ROWS = {"float32": RowType.F32, "bfloat16": RowType.BF16, "float16": RowType.F16}
_WIRES = {"int8": WireType.I8, "fp8": WireType.F8}


def copy_blocks(
    destination: CacheView,
    destination_blocks: BlockIds,
    source: CacheView,
    source_blocks: BlockIds,
    *,
    library: Library | None = None,
    stream: bool = True,
) -> None:
    """Copy block source_blocks[i] to destination_blocks[i]. The two must not overlap; destination blocks are distinct.

    `stream`: write past the caches what is long enough, which is quicker where nobody reads it at once.
    Raises ValueError: views of different shapes, as many ids on both sides not given, an id that a view has not.
    """
    to_ids = checked_ids(destination_blocks, destination, "destination")
    from_ids = checked_ids(source_blocks, source, "source")
    if len(to_ids) != len(from_ids):
        raise ValueError(f"{len(from_ids)} source blocks for {len(to_ids)} destination blocks")
    if _shape(destination) != _shape(source):
        raise ValueError(
            f"blocks of {_described(source)} do not fit into blocks of {_described(destination)}"
        )
    library = library or _own()
    if library is None:
        relayout.copy_blocks(destination, to_ids, source, from_ids)
        return
    to, of = _struct(destination), _struct(source)
    _functions(library).hr_copy_blocks(to, to_ids.ctypes.data, of, from_ids.ctypes.data, len(to_ids), stream)


def compress_blocks(
    out: NDArray[np.uint8],
    source: CacheView,
    source_blocks: BlockIds,
    *,
    dtype: Dtype,
    wire: Wire,
    library: Library | None = None,
) -> None:
    """Blocks of rows of `dtype` into `out`, contiguous, wire_block_bytes each, in the order of `source_blocks`.

    Raises ValueError: an id that the view has not, rows that are not of `dtype`, `out` of another size.
    """
    ids = checked_ids(source_blocks, source, "source")
    _check_wire(out, source, len(ids), dtype, wire)
    if not out.flags.writeable:
        raise ValueError("the bytes to compress into are read-only")
    if not len(ids):
        return
    library = library or _own()
    if library is None:
        relayout.compress_blocks(out.reshape(len(ids), -1), source, ids, dtype, wire)
        return
    _done(
        _functions(library).hr_compress_blocks(
            out.ctypes.data, _struct(source), ids.ctypes.data, len(ids), _ROWS[dtype], _WIRES[wire]
        )
    )


def restore_blocks(
    destination: CacheView,
    destination_blocks: BlockIds,
    wire_bytes: NDArray[np.uint8],
    *,
    dtype: Dtype,
    wire: Wire,
    library: Library | None = None,
) -> None:
    """The reverse: what `compress_blocks` wrote, into blocks of rows of `dtype`, which need not be the source's.

    Raises ValueError as `compress_blocks`.
    """
    ids = checked_ids(destination_blocks, destination, "destination")
    _check_wire(wire_bytes, destination, len(ids), dtype, wire)
    if not len(ids):
        return
    library = library or _own()
    if library is None:
        relayout.restore_blocks(destination, ids, wire_bytes.reshape(len(ids), -1), dtype, wire)
        return
    _done(
        _functions(library).hr_restore_blocks(
            _struct(destination),
            ids.ctypes.data,
            wire_bytes.ctypes.data,
            len(ids),
            _ROWS[dtype],
            _WIRES[wire],
        )
    )


@functools.cache
def _own() -> Library | None:
    """The best library of this machine; None where it cannot be built, which is not tried again."""
    try:
        return load("auto")
    except BuildError:
        return None


@functools.cache
def _functions(library: Library) -> ctypes.CDLL:
    cdll, view = library.cdll, POINTER(structures.CacheView)
    cdll.hr_copy_blocks.restype = None
    cdll.hr_copy_blocks.argtypes = (view, c_void_p, view, c_void_p, c_int64, c_int32)
    cdll.hr_compress_blocks.restype = cdll.hr_restore_blocks.restype = c_int32
    cdll.hr_compress_blocks.argtypes = (c_void_p, view, c_void_p, c_int64, c_int32, c_int32)
    cdll.hr_restore_blocks.argtypes = (view, c_void_p, c_void_p, c_int64, c_int32, c_int32)
    return cdll


@functools.lru_cache(maxsize=256)
def _struct(view: CacheView) -> structures.CacheView:
    return structures.CacheView(*(getattr(view, name) for name in CacheView.__slots__))


def _shape(view: CacheView) -> tuple[int, int, int, int]:
    return view.num_layers, view.num_heads, view.num_tokens, view.row_bytes


def _described(view: CacheView) -> str:
    return "{} layers, {} heads, {} tokens, rows of {} bytes".format(*_shape(view))


def _check_wire(array: NDArray[np.uint8], view: CacheView, blocks: int, dtype: str, wire: str) -> None:
    if dtype not in _ROWS or wire not in _WIRES:
        raise ValueError(f"{dtype} as {wire}; known are {', '.join(_ROWS)} as {', '.join(_WIRES)}")
    item = relayout.ITEM_BYTES[dtype]
    if view.row_bytes % item:
        raise ValueError(f"rows of {view.row_bytes} bytes do not hold {dtype}")
    wanted = blocks * wire_block_bytes(
        view.num_layers, view.num_heads, view.num_tokens, view.row_bytes // item
    )
    if array.dtype != np.uint8 or array.size != wanted or not array.flags.c_contiguous:
        raise ValueError(
            f"{blocks} blocks of {_described(view)} ({dtype}) are {wanted} contiguous bytes on the wire, "
            f"not {array.dtype} {array.shape}"
        )


def _done(had_memory: int) -> None:
    if not had_memory:
        raise MemoryError("no memory for one row of the KV cache in float32")
