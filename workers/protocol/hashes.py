"""Block hashes: the name of a cached prefix, equal in every process, on every machine, in every version.

    h[i] = H(h[i-1], token_ids[i*B:(i+1)*B], extra[i])      H = SHA-256 cut to 128 bits

Token ids are little-endian u32. `h[-1]`, the root, is H of (model fingerprint, dtype of the KV cache, B). Only full
blocks have a hash. `extra` is

    in every block of a request with a LoRA adapter: 0xFF, the length of the adapter's digest (one byte), the digest
    then, in block 0: the tenant's cache salt as UTF-8

and nothing else, so that a request without adapter and salt has the hashes it always had. No UTF-8 text holds 0xFF: a
salt can't pass for an adapter. Everything before `extra` has one width for each B, so nothing can pass for `extra`.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

HASH_BYTES = 16


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()[:HASH_BYTES]


def hash_root(model_fingerprint: str, kv_dtype: str, block_size: int) -> bytes:
    """h[-1] of the chain."""
    name = model_fingerprint.encode()
    dtype = kv_dtype.encode()
    return _digest(struct.pack("<II", len(name), len(dtype)), name, dtype, struct.pack("<I", block_size))


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    if packed.itemsize != 4 or struct.pack("=I", 1) != struct.pack("<I", 1):
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    return packed.tobytes()


def _lora_extra(lora: bytes) -> bytes:
    """What an adapter adds to each block; `lora` is its digest, empty: the base model."""
    if len(lora) > 255:
        raise ValueError(f"lora: a digest of {len(lora)} bytes, at most 255 are allowed")
    return b"\xff" + bytes([len(lora)]) + lora if lora else b""


def extend_hashes(
    hashes: list[bytes],
    token_ids: Sequence[int],
    block_size: int,
    root: bytes,
    cache_salt: str = "",
    lora: bytes = b"",
) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` does not yet cover. Raises ValueError."""
    first = len(hashes)
    last = len(token_ids) // block_size
    if last <= first:
        return
    data = _token_bytes(token_ids[first * block_size : last * block_size])
    stride = block_size * 4
    parent = hashes[-1] if hashes else root
    adapter = _lora_extra(lora)
    sha256 = hashlib.sha256
    for index in range(first, last):
        offset = (index - first) * stride
        extra = adapter + cache_salt.encode() if index == 0 else adapter
        parent = sha256(parent + data[offset : offset + stride] + extra).digest()[:HASH_BYTES]
        hashes.append(parent)


def block_hashes(
    token_ids: Sequence[int], block_size: int, root: bytes, cache_salt: str = "", lora: bytes = b""
) -> list[bytes]:
    """Hashes of every full block of `token_ids`. Raises ValueError."""
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size, root, cache_salt, lora)
    return hashes
