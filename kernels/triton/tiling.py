"""How the work of an attention launch is cut up, chosen by reasoning until it has been measured."""

from __future__ import annotations

from dataclasses import dataclass

import triton

_ENOUGH_PROGRAMS = 1024  # for about 132 multiprocessors that hold several each
_MOST_BYTES = 128 * 1024**2  # of what the parts leave to be added up


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut up. It changes speed, and in the last bits the order of sums."""

    heads: int  # query heads of a tile; they divide those that share a KV head
    rows: int  # of a tile: a power of two, at least 16 and at least `heads`
    keys: int  # looked at together: a power of two, at least 16
    parts: int  # of a context, at most
    least: int  # keys of a part, at least
    warps: int = 4
    stages: int = 2

    @classmethod
    def choose(
        cls,
        group: int,
        num_kv_heads: int,
        seqs: int,
        max_queries: int,
        max_length: int,
        dim: int,
        itemsize: int,
    ) -> Tiling:
        """By what is known when a launch is captured. `dim`: of what is summed, the values."""
        widest = 64 if dim > 128 or itemsize == 4 else 128
        heads = next(n for n in range(min(group, widest), 0, -1) if group % n == 0)
        wanted: int = triton.next_power_of_2(heads * max_queries)
        rows = max(16, triton.next_power_of_2(heads), min(wanted, widest))
        keys = 64 if dim * itemsize <= 256 else 32
        # Without parts there are too few programs to keep the memory busy, or one long context is waited for. With many
        # of them their sums are what is written and read: few sequences get many parts, many get few and long ones.
        programs = seqs * num_kv_heads * (group // heads)
        parts = max(4, min(64, _ENOUGH_PROGRAMS // programs))
        least = 128 if programs <= 64 else 256 if programs <= 256 else 512 if programs <= 1024 else 1024
        tile_bytes = rows * triton.next_power_of_2(dim) * 4
        parts = min(parts, triton.cdiv(max_length, least), max(1, _MOST_BYTES // (programs * tile_bytes)))
        return cls(
            heads,
            rows,
            keys,
            parts,
            least,
            8 if rows * dim >= 16384 else 4,
            3 if rows <= 32 and dim <= 256 else 2,
        )
