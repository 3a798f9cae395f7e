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


LORA = bytes(range(32))
LORA_VECTORS = [
    (range(32), 16, "", LORA, ["34df7b40b120ced4986ef2e60499fb57", "7e39c3aea40d10f645c00343166f5a1d"]),
    (
        range(32),
        16,
        "tenant-a",
        LORA,
        ["137d1b1136c78568681cf24c553157e6", "dcf6c5141ad3d52bc9aed160e48184a4"],
    ),
]


def test_root_vector() -> None:
    assert ROOT.hex() == "5a6392a10edae4bf60d711867bc2db66"


@pytest.mark.parametrize(("tokens", "block_size", "salt", "lora", "expected"), LORA_VECTORS)
def test_vectors_with_an_adapter(
    tokens: range, block_size: int, salt: str, lora: bytes, expected: list[str]
) -> None:
    assert [h.hex() for h in block_hashes(tokens, block_size, ROOT, salt, lora)] == expected


def by_definition(tokens: list[int], block_size: int, salt: str, lora: bytes) -> list[bytes]:
    parent, hashes = ROOT, []
    adapter = b"\xff" + struct.pack("B", len(lora)) + lora if lora else b""
    for i in range(len(tokens) // block_size):
        block = tokens[i * block_size : (i + 1) * block_size]
        data = parent + struct.pack(f"<{block_size}I", *block) + adapter + (salt.encode() if i == 0 else b"")
        parent = hashlib.sha256(data).digest()[:16]
        hashes.append(parent)
    return hashes


@pytest.mark.parametrize(("tokens", "block_size", "salt", "expected"), VECTORS)
def test_vectors(tokens: range, block_size: int, salt: str, expected: list[str]) -> None:
    assert [h.hex() for h in block_hashes(tokens, block_size, ROOT, salt)] == expected


@given(TOKENS, st.integers(1, 20), st.text(max_size=5), st.binary(max_size=40))
def test_equals_the_definition(tokens: list[int], block_size: int, salt: str, lora: bytes) -> None:
    expected = by_definition(tokens, block_size, salt, lora)
    assert block_hashes(tokens, block_size, ROOT, salt, lora) == expected


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


EXTRAS = st.tuples(st.text(max_size=4), st.binary(max_size=4))


@given(EXTRAS, EXTRAS)
def test_adapters_and_salts_do_not_pass_for_one_another(a: tuple[str, bytes], b: tuple[str, bytes]) -> None:
    tokens = list(range(12))
    assert (block_hashes(tokens, 4, ROOT, *a) == block_hashes(tokens, 4, ROOT, *b)) == (a == b)


def test_an_adapter_is_in_every_block() -> None:
    tokens = list(range(48))
    plain, adapted = block_hashes(tokens, 16, ROOT), block_hashes(tokens, 16, ROOT, lora=LORA)
    assert not set(plain) & set(adapted)
    # The parent alone would do for all but a block that follows equal parents: `extra` is in each by itself.
    follow = [ROOT]
    extend_hashes(follow, tokens, 16, ROOT, lora=LORA)
    other = [ROOT]
    extend_hashes(other, tokens, 16, ROOT)
    assert follow[1] != other[1]


def test_a_digest_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="lora: a digest of 256 bytes, at most 255 are allowed"):
        block_hashes([1], 1, ROOT, lora=bytes(256))
