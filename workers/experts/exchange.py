"""How tokens reach the ranks that have their experts, and how the results come back.

An exchange belongs to one view of a group (workers/experts/membership.py): its members are numbered 0 .. size - 1 in
the order of their ranks, and when one of them dies it is thrown away. All members call the same methods in the same
order, with the numbers of tokens that they happen to have, 0 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class GroupBroken(Exception):
    """A rank has died or failed during the step: it has not happened, and is run again in the next view."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Tokens of one member for the experts of another. A token that goes to several of them travels once."""

    ids: NDArray[np.int32]  # [A, 2]: row of `rows`, slot of the receiver
    rows: Tensor  # [M, H]


@dataclass(frozen=True, slots=True)
class Bound:
    """A parcel before it is packed: tokens of the sender."""

    ids: NDArray[np.int32]  # [A, 2]: index into `tokens`, slot of the receiver
    tokens: NDArray[np.int64]  # [M]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of what travels. The most that one member ever sends bounds the memory."""

    hidden: int
    dtype: str  # torch's name, of tokens
    result_dtype: str
    max_tokens: int  # in one step of one member
    top_k: int
    header: int = 4  # int64 words of `headers`

    @property
    def row_bytes(self) -> int:
        return self.hidden * _ITEM_BYTES[self.dtype]

    @property
    def result_bytes(self) -> int:
        """Of a row of results."""
        return self.hidden * _ITEM_BYTES[self.result_dtype]

    @property
    def max_parcel_bytes(self) -> int:
        """Of ids and rows, or of results: every token of a step to one member, all its experts there."""
        assignments = self.max_tokens * self.top_k
        return max(assignments * 8 + self.max_tokens * self.row_bytes, assignments * self.result_bytes)


class Exchange(Protocol):
    """What stays here does not travel: at one's own number lists hold None. Every method raises GroupBroken."""

    @property
    def size(self) -> int: ...

    @property
    def me(self) -> int: ...

    def headers(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        """What every member gave: [size, words]."""

    def dispatch(self, x: Tensor, bound: Sequence[Bound]) -> None:
        """Send each member its tokens of x [T, H]. Returns when x may be overwritten; `receive` must follow."""

    def receive(self) -> list[Parcel | None]:
        """What the others have sent; valid until `combine` returns."""

    def room(self, counts: Sequence[int]) -> list[Tensor | None]:
        """[counts[member], H]: where what goes back may be written, so that `combine` need not copy it."""

    def combine(self, outputs: Sequence[Tensor | None]) -> None:
        """Send back one row for each of a parcel's ids, in their order: [A, H]. `results` must follow."""

    def results(self, counts: Sequence[int]) -> list[Tensor | None]:
        """The others' answers to `dispatch`: [counts[member], H], valid until the next `dispatch` returns."""

    def abort(self) -> None:
        """From any thread: whoever waits here raises GroupBroken, and so does every later call."""

    def close(self) -> None:
        """After the last call of the others. Idempotent."""
