"""What a tier has gained and lost since somebody asked last: net, so that it is bounded by what the tier holds."""

from __future__ import annotations


class Changes:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._stored: dict[bytes, bytes] = {}  # hash -> parent
        self._removed: dict[bytes, None] = {}

    def stored(self, block_hash: bytes, parent: bytes) -> None:
        if block_hash in self._removed:
            del self._removed[block_hash]
        else:
            self._stored[block_hash] = parent

    def removed(self, block_hash: bytes) -> None:
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._removed[block_hash] = None

    def drain(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """((hash, parent) of what came, hashes of what went). Nothing is in both."""
        changes = list(self._stored.items()), list(self._removed)
        self._stored, self._removed = {}, {}
        return changes
