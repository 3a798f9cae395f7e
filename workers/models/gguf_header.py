"""Bounds of a GGUF's metadata, checked before the gguf package reads them.

Its reader trusts lengths: an array length with a flipped bit makes it append empty values until memory ends.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from workers.models.errors import ModelError

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by GGUFValueType
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


def check_metadata(source: Path) -> None:
    """Raises ModelError when a length leads out of the file."""
    try:
        with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(data)
    except FileNotFoundError:
        raise ModelError(f"{source} does not exist") from None
    except (ValueError, OSError, struct.error) as error:
        raise ModelError(f"{source} is not a whole GGUF file ({error}); fetch it again") from error


def _walk(data: mmap.mmap) -> None:
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, _, count = struct.unpack_from("<IQQ", data, 4)
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is not supported, {_VERSIONS[0]} and {_VERSIONS[1]} are")
    offset = 24
    for _ in range(count):
        offset = _after_string(data, offset)
        (kind,) = struct.unpack_from("<I", data, offset)
        offset = _after_value(data, offset + 4, kind)


def _after_value(data: mmap.mmap, offset: int, kind: int) -> int:
    if kind == _STRING:
        return _after_string(data, offset)
    if kind == _ARRAY:
        item, length = struct.unpack_from("<IQ", data, offset)
        offset += 12
        if item == _STRING:
            for _ in range(length):
                offset = _after_string(data, offset)
            return offset
        kind, repeats = item, length
    else:
        repeats = 1
    if kind not in _SCALAR_BYTES:
        raise ValueError(f"metadata of unknown type {kind}")
    return _inside(data, offset + repeats * _SCALAR_BYTES[kind])


def _after_string(data: mmap.mmap, offset: int) -> int:
    (length,) = struct.unpack_from("<Q", data, offset)
    return _inside(data, offset + 8 + length)


def _inside(data: mmap.mmap, offset: int) -> int:
    if offset > len(data):
        raise ValueError(f"its metadata lead {offset - len(data)} bytes beyond its end")
    return offset
