"""One cached block as a file.

A file is written under a temporary name and renamed when it is whole, so a crash of the process leaves no half file
under a final name. A crash of the machine may (nothing is forced to the disk: it is a cache); lengths and checksums
tell. Numbers are little-endian:

    magic 8, version u32, pieces u32, root hash 16, own hash 16, parent hash 16, length of the payload u64,
    CRC-32 of the payload u32, CRC-32 of the header up to here u32, payload

The root hash names the model, the dtype of the KV cache and the block size. `pieces`: the payload is that many equal
parts, one for each rank that shares the KV heads.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from workers.protocol.hashes import HASH_BYTES

SUFFIX = ".kv"
TEMPORARY = ".tmp"
_MAGIC = b"headrcKV"
_VERSION = 1
_FIELDS = struct.Struct(f"<8sII{HASH_BYTES}s{HASH_BYTES}s{HASH_BYTES}sQI")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECK.size


class Corrupt(Exception):
    """The file is not what was written."""


@dataclass(frozen=True, slots=True)
class Header:
    root: bytes
    block_hash: bytes
    parent: bytes
    num_pieces: int
    num_bytes: int  # of the payload
    checksum: int = 0  # of the payload


def file_name(block_hash: bytes) -> str:
    return block_hash.hex() + SUFFIX


def write_block(directory: Path, header: Header, payload: Sequence[memoryview]) -> None:
    """The file is there, whole, or OSError is raised and nothing is. One writer at a time for one hash."""
    checksum = 0
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    final = directory / file_name(header.block_hash)
    temporary = final.with_suffix(TEMPORARY)
    try:
        with open(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0
        ) as file:
            for part in (memoryview(_pack(header, checksum)), *payload):
                rest = part
                while rest:
                    rest = rest[file.write(rest) :]
        os.replace(temporary, final)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_header(path: Path) -> Header:
    """Raises Corrupt, and OSError. Only the header and the file's length are looked at."""
    with path.open("rb", buffering=0) as file:
        return _unpack(file, path)


def read_block(directory: Path, expected: Header, parts: Sequence[memoryview]) -> None:
    """Fill `parts`. Raises Corrupt (the parts are spoilt then), and OSError."""
    path = directory / file_name(expected.block_hash)
    with path.open("rb", buffering=0) as file:
        header = _unpack(file, path)
        if _identity(header) != _identity(expected):
            raise Corrupt(f"{path.name} holds another block than its name says")
        checksum = 0
        for part in parts:
            rest = part
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise Corrupt(f"{path.name} ends early")
                rest = rest[count:]
            checksum = zlib.crc32(part, checksum)
        if checksum != header.checksum:
            raise Corrupt(f"{path.name} has bytes that were not written")


def _identity(header: Header) -> tuple[bytes, bytes, int, int]:
    return header.root, header.block_hash, header.num_pieces, header.num_bytes


def _pack(header: Header, checksum: int) -> bytes:
    fields = _FIELDS.pack(
        _MAGIC,
        _VERSION,
        header.num_pieces,
        header.root,
        header.block_hash,
        header.parent,
        header.num_bytes,
        checksum,
    )
    return fields + _CHECK.pack(zlib.crc32(fields))


def _unpack(file: FileIO, path: Path) -> Header:
    raw = file.read(HEADER_BYTES)
    if raw is None or len(raw) != HEADER_BYTES:
        raise Corrupt(f"{path.name} has no whole header")
    if zlib.crc32(raw[: _FIELDS.size]) != _CHECK.unpack_from(raw, _FIELDS.size)[0]:
        raise Corrupt(f"{path.name} has a header that was not written")
    magic, version, num_pieces, root, block_hash, parent, num_bytes, checksum = _FIELDS.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION:
        raise Corrupt(f"{path.name} is of another version")
    if os.fstat(file.fileno()).st_size != HEADER_BYTES + num_bytes:
        raise Corrupt(f"{path.name} is not as long as it says")
    return Header(root, block_hash, parent, num_pieces, num_bytes, checksum)
