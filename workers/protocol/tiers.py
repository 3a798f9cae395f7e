"""Where a worker keeps a cached block, fastest first, and how Redis is told.

A worker may keep a block in several tiers. A snapshot in Redis is a set with one member for each (hash, tier).
"""

from __future__ import annotations

from workers.protocol.hashes import HASH_BYTES

DEVICE, HOST, DISK = "device", "host", "disk"
TIERS = (DEVICE, HOST, DISK)
MEMBER_BYTES = HASH_BYTES + 1

Stored = tuple[bytes, bytes, str]  # (hash, parent hash, tier)
Removed = tuple[bytes, str]  # (hash, tier)

_CODES = {tier: b"%d" % number for number, tier in enumerate(TIERS)}


def pack_member(block_hash: bytes, tier: str) -> bytes:
    """The hash and one more byte."""
    return block_hash + _CODES[tier]


def unpack_member(member: bytes) -> Removed:
    """(hash, tier). A tier that this version does not know counts as the slowest."""
    number = member[HASH_BYTES] - ord("0") if len(member) == MEMBER_BYTES else -1
    return member[:HASH_BYTES], TIERS[number] if 0 <= number < len(TIERS) else DISK
