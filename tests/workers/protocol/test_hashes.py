"""Block hashes: fixed vectors, so that no version ever disagrees with another, and the properties routing rests on."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.protocol.hashes import block_hashes, extend_hashes, hash_root

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)
ROOT = hash_root("ab", "bfloat16", 16)

# These are part of the protocol: a change here means that workers and routers of two versions share no prefix.
VECTORS = [
    (range(32), 16, "", ["75a1b8087393cda95c451e8920cb53d0", "745c1c86267c472ba432ba6dec1be69e"]),
    (range(32), 16, "tenant-a", ["16fbcb5cf5e4e4c304aeb2e6428bc90c", "84402948f9ac75e252a2cbe07b5fe546"]),
    ([2**32 - 1] * 5, 4, "", ["817d737f2eecf8a4e1b49d81a5dee616"]),
]


def test_root_vector() -> None:
    assert ROOT.hex() == "5a6392a10edae4bf60d711867bc2db66"


def by_definition(tokens: list[int], block_size: int, salt: str) -> list[bytes]:
    parent, hashes = ROOT, []
    for i in range(len(tokens) // block_size):
        block = tokens[i * block_size : (i + 1) * block_size]
        data = parent + struct.pack(f"<{block_size}I", *block) + (salt.encode() if i == 0 else b"")
        parent = hashlib.sha256(data).digest()[:16]
        hashes.append(parent)
    return hashes


@pytest.mark.parametrize(("tokens", "block_size", "salt", "expected"), VECTORS)
def test_vectors(tokens: range, block_size: int, salt: str, expected: list[str]) -> None:
    assert [h.hex() for h in block_hashes(tokens, block_size, ROOT, salt)] == expected


@given(TOKENS, st.integers(1, 20), st.text(max_size=5))
def test_equals_the_definition(tokens: list[int], block_size: int, salt: str) -> None:
    assert block_hashes(tokens, block_size, ROOT, salt) == by_definition(tokens, block_size, salt)


@given(TOKENS, TOKENS, st.integers(1, 20))
def test_extending_is_hashing_the_whole(first: list[int], more: list[int], block_size: int) -> None:
    hashes = block_hashes(first, block_size, ROOT)
    extend_hashes(hashes, first + more, block_size, ROOT)
    assert hashes == block_hashes(first + more, block_size, ROOT)


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], block_size: int) -> None:
    pairs = zip(block_hashes(a, block_size, ROOT), block_hashes(b, block_size, ROOT), strict=False)
    for i, (x, y) in enumerate(pairs):
        assert (x == y) == (a[: (i + 1) * block_size] == b[: (i + 1) * block_size])


def test_what_must_differ_differs() -> None:
    tokens = list(range(16))
    variants = {
        block_hashes(tokens, 16, hash_root(*root), salt)[0]
        for root in [
            ("m", "bfloat16", 16),
            ("n", "bfloat16", 16),
            ("m", "float32", 16),
            ("mb", "float16", 16),
        ]
        for salt in ["", "a", "b"]
    }
    assert len(variants) == 12
    assert hash_root("a", "bc", 1) != hash_root("ab", "c", 1)
