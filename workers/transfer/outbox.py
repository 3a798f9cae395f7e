"""What waits to be sent on one channel: transfers take turns, each in its own order. Pure."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """A message goes before every piece; of the transfers that have pieces, each gives one in turn."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._pieces: dict[str, deque[T]] = {}  # transfer id -> its pieces; the first transfer is next

    def __len__(self) -> int:
        return len(self._messages) + sum(len(pieces) for pieces in self._pieces.values())

    def put_message(self, message: Any) -> None:
        self._messages.append(message)

    def put(self, transfer_id: str, piece: T) -> None:
        self._pieces.setdefault(transfer_id, deque()).append(piece)

    def has_message(self) -> bool:
        return bool(self._messages)

    def take_message(self) -> Any:
        return self._messages.popleft()

    def has_piece(self) -> bool:
        return bool(self._pieces)

    def take(self) -> T:
        transfer_id = next(iter(self._pieces))
        pieces = self._pieces.pop(transfer_id)
        piece = pieces.popleft()
        if pieces:
            self._pieces[transfer_id] = pieces  # behind the others
        return piece

    def drop(self, transfer_id: str) -> list[T]:
        """The pieces of a transfer that has ended."""
        return list(self._pieces.pop(transfer_id, ()))

    def drop_all(self) -> list[T]:
        found = [piece for pieces in self._pieces.values() for piece in pieces]
        self._pieces.clear()
        self._messages.clear()
        return found
