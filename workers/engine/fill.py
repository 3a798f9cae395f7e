"""Blocks that are being filled with a prefix's bytes from somewhere else than a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False, frozen=True)
class Fill:
    """References on a prefix while it is filled: `held` is on the device already, `blocks` are to be written.

    Made by `Scheduler.begin_fill` and ended, exactly once, by `Scheduler.end_fill`. In between nobody else is given
    its blocks, and nobody finds them.
    """

    held: list[int]  # blocks of the prefix before the first that is written
    blocks: list[int]  # fresh ones, one for each hash
    hashes: list[bytes]
    parent: bytes  # hash before hashes[0], or the root

    @property
    def first_index(self) -> int:
        """Index of blocks[0] in the prefix."""
        return len(self.held)

    @property
    def table(self) -> list[int]:
        """Every block that the fill holds a reference on, in the order of the prefix."""
        return [*self.held, *self.blocks]
