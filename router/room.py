"""What a router remembers of a worker that said `busy`. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from workers.protocol.messages import Load, Room


@dataclass(frozen=True, slots=True)
class Refusal:
    """Whom the worker is not asked for again, until it tells of room for what it refused."""

    lacks: Room | None  # None: it did not say what it has too little of
    from_blocks: int  # requests that need fewer may be tried; 0: none

    @classmethod
    def of(cls, lacks: Room | None, before: Refusal | None = None) -> Refusal:
        """Of two the one that refuses more."""
        only_blocks = lacks is not None and not (lacks.requests or lacks.tokens)
        refusal = cls(lacks, lacks.blocks if lacks is not None and only_blocks else 0)
        return refusal if before is None or refusal.from_blocks <= before.from_blocks else before

    def refuses(self, num_blocks: int) -> bool:
        """A request of so many blocks, as far as is known."""
        return num_blocks >= self.from_blocks

    def is_over(self, load: Load) -> bool:
        return self.lacks is None or load.room is None or load.room.covers(self.lacks)
