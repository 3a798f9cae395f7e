"""Which KV heads lie on which rank, and what each rank of the sender has for each rank of the receiver.

Pure. Tensor parallelism shares the KV heads of a model out among ranks in runs of equal length; with more ranks than
heads several ranks hold the same one. Prefill and decode workers need not agree on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

_MAX_RANKS = (
    1024  # peers say how many they have, and parts are counted out before anything else is known of them
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank of the sender has for one rank of the receiver."""

    source: int  # rank
    destination: int  # rank
    heads: range  # of the model

    def source_heads(self, ranks: int, num_kv_heads: int) -> range:
        """The same heads, counted from the first that the source has."""
        return _counted_from(heads_of(self.source, ranks, num_kv_heads).start, self.heads)

    def destination_heads(self, ranks: int, num_kv_heads: int) -> range:
        return _counted_from(heads_of(self.destination, ranks, num_kv_heads).start, self.heads)


def heads_of(rank: int, ranks: int, num_kv_heads: int) -> range:
    """KV heads of the model that a rank holds. Raises ValueError when they can't be shared out evenly."""
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    _check(ranks, num_kv_heads)
    if ranks <= num_kv_heads:
        each = num_kv_heads // ranks
        return range(rank * each, (rank + 1) * each)
    copies = ranks // num_kv_heads
    return range(rank // copies, rank // copies + 1)


def parts(source_ranks: int, destination_ranks: int, num_kv_heads: int) -> tuple[Part, ...]:
    """Every head of every destination rank exactly once. Where several sources hold a head, they take turns.

    Raises ValueError when either side's heads can't be shared out evenly.
    """
    _check(source_ranks, num_kv_heads)
    _check(destination_ranks, num_kv_heads)
    found = []
    for destination in range(destination_ranks):
        wanted = heads_of(destination, destination_ranks, num_kv_heads)
        if source_ranks > num_kv_heads:
            copies = source_ranks // num_kv_heads
            for head in wanted:
                found.append(Part(head * copies + destination % copies, destination, range(head, head + 1)))
            continue
        for source in range(source_ranks):
            held = heads_of(source, source_ranks, num_kv_heads)
            heads = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
            if heads:
                found.append(Part(source, destination, heads))
    return tuple(found)


def _check(ranks: int, num_kv_heads: int) -> None:
    if not 0 < ranks <= _MAX_RANKS:
        raise ValueError(f"{ranks} ranks; a worker has 1 to {_MAX_RANKS}")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads cannot be shared out evenly among {ranks} ranks")


def _counted_from(first: int, heads: range) -> range:
    return range(heads.start - first, heads.stop - first)
