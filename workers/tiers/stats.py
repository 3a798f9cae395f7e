"""What a tier tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TierStats:
    capacity_blocks: int
    blocks: int = 0
    stored_blocks: int = 0  # since start: copied or written into it
    dropped_blocks: int = 0  # since start: it had no place for them, or could not write fast enough
    errors: int = 0  # since start: files that were not what was written, and failures of the disk
    active: bool = True  # False: it has switched itself off
