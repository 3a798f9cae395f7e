"""Which part of a model one of several ranks holds under tensor parallelism. Pure.

Megatron-LM's cut (Shoeybi et al. 2019, section 3): query heads and the MLP's neurons are shared out, so that a block's
first projection needs nothing of the others and its second one gives a part of a sum; the vocabulary is cut by rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of `size`."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: ranks are 0 to {self.size - 1}")

    @property
    def whole(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """What is added to a sum once, a bias say, is added by this rank."""
        return self.rank == 0

    def equal_part(self, count: int) -> range:
        """Of `count` things that can be shared out evenly, see `workers.models.sharding`."""
        each, rest = divmod(count, self.size)
        assert rest == 0, f"{count} among {self.size} ranks"
        return range(self.rank * each, (self.rank + 1) * each)

    def rows_of(self, count: int) -> range:
        """Of `count` rows, as many for each rank as `rows_each` says; the last ranks may have fewer, or none."""
        each = self.rows_each(count)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def rows_each(self, count: int) -> int:
        return -(-count // self.size)


WHOLE = Shard(0, 1)
