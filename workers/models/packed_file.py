"""A file of packed weights that is mapped into memory as it lies.

    magic, offset of the index, its length, its SHA-256       64 bytes, written last: a cut file has none
    arrays, in the order in which a step reads them           4,096-byte boundaries; small ones 64
    index: JSON                                               to the end of the file

The layout of the arrays is that of kernels/cpu/src/matrix.h, the same for every instruction set.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.packed import PackedMatrix
from kernels.cpu.structures import Format
from workers.huge_pages import huge_zeros

Memory = Literal["mmap", "huge", "lazy"]

_MAGIC = b"HRPACKED"
_HEAD = struct.Struct("<8sQQ32s")
_PAGE = 4096
_LINE = 64
_DTYPES = ("uint8", "uint16", "float32")


class DamagedFile(ValueError):
    """The file is cut, altered or not one of these."""


@dataclass(frozen=True)
class PackedFile:
    """Views of one mapping, read-only. The mapping lives as long as any of them."""

    key: str
    matrices: dict[str, PackedMatrix]
    arrays: dict[str, NDArray[Any]]  # norms float32; embedding rows float32 or bfloat16 bits (uint16)


class PackedFileWriter:
    """Arrays are written as they come, so that memory holds one of them. Whole when the block is left without an error:
    before that no reader takes the file."""

    def __init__(self, path: Path, key: str) -> None:
        self._stream = path.open("wb")
        self._stream.write(bytes(_PAGE))
        self._index: dict[str, Any] = {"key": key, "matrices": {}, "arrays": {}}

    def matrix(self, name: str, packed: PackedMatrix) -> None:
        self._index["matrices"][name] = {
            "format": packed.format.name,
            "n": packed.n,
            "k": packed.k,
            "n_pad": packed.n_pad,
            "k_pad": packed.k_pad,
            "data": self._write(packed.data, _PAGE),
            "scale": None if packed.scale is None else self._write(packed.scale, _LINE),
            "bias": None if packed.bias is None else self._write(packed.bias, _LINE),
        }

    def array(self, name: str, values: NDArray[Any]) -> None:
        assert values.dtype.name in _DTYPES, values.dtype
        self._index["arrays"][name] = self._write(values, _LINE if values.ndim == 1 else _PAGE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(complete=error is None)

    def close(self, *, complete: bool) -> None:
        with self._stream as stream:
            if not complete:
                return
            text = json.dumps(self._index).encode()
            offset = stream.tell()
            stream.write(text)
            stream.seek(0)
            stream.write(_HEAD.pack(_MAGIC, offset, len(text), hashlib.sha256(text).digest()))
            stream.flush()
            os.fsync(stream.fileno())  # the file is renamed into place next: its bytes must not come later

    def _write(self, values: NDArray[Any], boundary: int) -> dict[str, Any]:
        data = np.ascontiguousarray(values)
        self._stream.write(bytes(-self._stream.tell() % boundary))
        offset = self._stream.tell()
        self._stream.write(data.data)
        return {
            "dtype": values.dtype.name,
            "shape": list(values.shape),
            "offset": offset,
            "crc32": zlib.crc32(data.data),
        }


def open_packed(
    path: Path, memory: Memory = "mmap", *, key: str | None = None, verify: bool = False
) -> PackedFile:
    """mmap: pages of the file, shared by all processes of the host. huge: a private copy in huge pages. lazy: as mmap,
    but pages are read from the file when they are first touched.

    `key`, when given, must be the file's. The index is always checked, the arrays' own checksums with `verify`: those
    take about a second per GB. Raises DamagedFile, and OSError when the file cannot be opened.
    """
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        index = _read_index(path, stream, size)
        if key is not None and index.get("key") != key:
            raise DamagedFile(f"{path} holds {index.get('key')!r}, not {key!r}")
        whole = _copied(stream, size) if memory == "huge" else _mapped(stream, size, memory == "mmap")
    view = _View(path, whole, verify)
    try:
        matrices = {name: view.matrix(entry) for name, entry in index["matrices"].items()}
        arrays = {name: view.array(entry) for name, entry in index["arrays"].items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path} has an index that makes no sense: {error!r}") from error
    return PackedFile(str(index["key"]), matrices, arrays)


def _read_index(path: Path, stream: io.FileIO, size: int) -> dict[str, Any]:
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise DamagedFile(f"{path} is not a whole file of packed weights")
    _, offset, length, digest = _HEAD.unpack(head)
    if offset + length != size:
        raise DamagedFile(f"{path} has {size} bytes, not {offset + length}")
    stream.seek(offset)
    text = stream.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise DamagedFile(f"{path} has a damaged index")
    index: dict[str, Any] = json.loads(text)
    return index


def _mapped(stream: io.FileIO, size: int, populate: bool) -> NDArray[np.uint8]:
    # Where the first step reads it all it would fault on every 4 KiB.
    flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if populate else 0)
    return np.frombuffer(mmap.mmap(stream.fileno(), size, flags=flags, prot=mmap.PROT_READ), np.uint8)


def _copied(stream: io.FileIO, size: int) -> NDArray[np.uint8]:
    whole = huge_zeros(size)
    stream.seek(0)
    done = 0
    while done < size:
        count = stream.readinto(whole[done:].data)
        if not count:
            raise DamagedFile(f"{stream.name} became shorter while it was read")
        done += count
    whole.flags.writeable = False
    return whole


class _View:
    """Arrays of the index as views of `whole`."""

    def __init__(self, path: Path, whole: NDArray[np.uint8], verify: bool) -> None:
        self._path, self._whole, self._verify = path, whole, verify

    def matrix(self, entry: dict[str, Any]) -> PackedMatrix:
        packed = PackedMatrix(
            format=Format[entry["format"]],
            n=int(entry["n"]),
            k=int(entry["k"]),
            data=self.array(entry["data"]),
            scale=None if entry["scale"] is None else self.array(entry["scale"]),
            bias=None if entry["bias"] is None else self.array(entry["bias"]),
        )
        if (packed.n_pad, packed.k_pad) != (entry["n_pad"], entry["k_pad"]):
            raise DamagedFile(f"{self._path} is padded to {entry['n_pad']} x {entry['k_pad']}")
        return packed

    def array(self, entry: dict[str, Any]) -> NDArray[Any]:
        if entry["dtype"] not in _DTYPES:
            raise DamagedFile(f"{self._path} holds {entry['dtype']}")
        dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), int(entry["offset"])
        data = self._whole[offset : offset + dtype.itemsize * int(np.prod(shape))]
        if self._verify and zlib.crc32(data.data) != entry["crc32"]:
            raise DamagedFile(f"{self._path} has damaged weights")
        values: NDArray[Any] = data.view(dtype).reshape(shape)
        return values
