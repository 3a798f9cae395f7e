"""The exchange of ranks that share a host: windows in one anonymous file that all of them map.

For each pair of members there are a word and two windows. The sender fills a window, then raises the word to the number
of the round; the receiver sleeps on the word. Two windows are enough without any acknowledgement: whoever writes round
n + 2 has everybody's round n + 1, and nobody sends that before it is done with what it received in round n.

Pages take memory when they are first touched: the file is as large as the largest step would need.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.experts.exchange import Bound, GroupBroken, Parcel, Shape
from workers.experts.futex import Word

_LINE = 64  # bytes: a word each, so that two senders do not fight for a cache line
_PAGE = 4096
_HEAD = 64  # bytes of a window before its payload: how many ids and rows
_LOOKS = 40  # at the word before sleeping: waking up costs more than a short wait, and the cores are few
_SLEEP_S = 0.02  # an abort is seen at the latest after this
_ROUNDS = 2**32


class Segment:
    """The memory of one view. The creator's descriptor names it (`path`) until it is closed."""

    def __init__(self, size: int, shape: Shape) -> None:
        fd = os.memfd_create("headrace-experts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, segment_bytes(size, shape))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.path = f"/proc/{os.getpid()}/fd/{fd}"

    def close(self) -> None:
        """Nobody else can join; those who have mapped it keep it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def segment_bytes(size: int, shape: Shape) -> int:
    return _words_bytes(size) + size * size * 2 * _window_bytes(shape)


def _words_bytes(size: int) -> int:
    return -(-size * size * _LINE // _PAGE) * _PAGE


def _window_bytes(shape: Shape) -> int:
    return -(-(_HEAD + _LINE + max(shape.max_parcel_bytes, 8 * shape.header)) // _PAGE) * _PAGE


class ShmExchange:
    def __init__(self, path: str, size: int, me: int, shape: Shape) -> None:
        """Raises OSError when the segment cannot be mapped, ValueError when it is not of this size."""
        self.size, self.me, self._shape = size, me, shape
        self._dtype, self._result_dtype = getattr(torch, shape.dtype), getattr(torch, shape.result_dtype)
        self._window_bytes = _window_bytes(shape)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            wanted, given = segment_bytes(size, shape), os.fstat(fd).st_size
            if given != wanted:
                raise ValueError(f"the exchange's memory has {given} bytes, {wanted} were expected")
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError("the exchange's memory could be shrunk under its readers")
            self._map = mmap.mmap(fd, wanted)
        finally:
            os.close(fd)
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        others = [member for member in range(size) if member != me]
        self._to = {member: Word(base + (me * size + member) * _LINE) for member in others}
        self._from = {member: Word(base + (member * size + me) * _LINE) for member in others}
        self._round = 0
        self._aborted = False

    # --- the collectives --------------------------------------------------------------------------------------------

    def headers(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        self._begin()
        for member in self._to:
            self._window(self.me, member)[: mine.nbytes].view(np.int64)[:] = mine
        self._announce()
        gathered = np.empty((self.size, len(mine)), np.int64)
        gathered[self.me] = mine
        for member in self._from:
            self._await(member)
            gathered[member] = self._window(member, self.me)[: mine.nbytes].view(np.int64)
        return gathered

    def dispatch(self, x: Tensor, bound: Sequence[Bound]) -> None:
        self._begin()
        for member in self._to:
            parcel = bound[member]
            window = self._window(self.me, member)
            head = window[:16].view(np.int64)
            head[0], head[1] = len(parcel.ids), len(parcel.tokens)
            ids, rows = self._parts(window, len(parcel.ids), len(parcel.tokens))
            ids[:] = parcel.ids
            if len(parcel.tokens):
                torch.index_select(x, 0, torch.from_numpy(parcel.tokens), out=rows)
        self._announce()

    def receive(self) -> list[Parcel | None]:
        parcels: list[Parcel | None] = [None] * self.size
        for member in self._from:
            self._await(member)
            window = self._window(member, self.me)
            num_ids, num_rows = (int(count) for count in window[:16].view(np.int64))
            parcels[member] = Parcel(*self._parts(window, num_ids, num_rows))
        return parcels

    def room(self, counts: Sequence[int]) -> list[Tensor | None]:
        room: list[Tensor | None] = [None] * self.size
        for member in self._to:
            room[member] = self._results(self._window(self.me, member, ahead=1), counts[member])
        return room

    def combine(self, outputs: Sequence[Tensor | None]) -> None:
        self._begin()
        for member in self._to:
            output = outputs[member]
            assert output is not None, f"nothing goes back to member {member}"
            window = self._results(self._window(self.me, member), len(output))
            if window.data_ptr() != output.data_ptr():
                window.copy_(output)
        self._announce()

    def results(self, counts: Sequence[int]) -> list[Tensor | None]:
        rows: list[Tensor | None] = [None] * self.size
        for member in self._from:
            self._await(member)
            rows[member] = self._results(self._window(member, self.me), counts[member])
        return rows

    def abort(self) -> None:
        self._aborted = True
        for word in self._from.values():
            word.wake()

    def close(self) -> None:
        """The mapping goes with the last view of it: unmapping under a reader would fault."""
        self._aborted = True

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._aborted:
            raise GroupBroken("the exchange was aborted")
        self._round += 1

    def _announce(self) -> None:
        for word in self._to.values():
            word.announce(self._round % _ROUNDS)

    def _await(self, member: int) -> None:
        """Until its window of this round is filled. It may be one round ahead, never more."""
        word, due = self._from[member], self._round % _ROUNDS
        for _ in range(_LOOKS):
            if (word.value - due) % _ROUNDS < 2:
                return
        while True:
            seen = word.value
            if (seen - due) % _ROUNDS < 2:
                return
            if self._aborted:
                raise GroupBroken("the exchange was aborted")
            word.sleep_while(seen, _SLEEP_S)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _window(self, sender: int, receiver: int, ahead: int = 0) -> NDArray[np.uint8]:
        """Of this round, or of one that comes."""
        number = (sender * self.size + receiver) * 2 + (self._round + ahead) % 2
        begin = _words_bytes(self.size) + number * self._window_bytes
        return self._bytes[begin : begin + self._window_bytes]

    def _parts(
        self, window: NDArray[np.uint8], num_ids: int, num_rows: int
    ) -> tuple[NDArray[np.int32], Tensor]:
        ids = window[_HEAD : _HEAD + 8 * num_ids].view(np.int32).reshape(num_ids, 2)
        first = _HEAD + -(-8 * num_ids // _LINE) * _LINE
        return ids, self._rows(window[first:], num_rows, self._shape.row_bytes, self._dtype)

    def _results(self, window: NDArray[np.uint8], count: int) -> Tensor:
        return self._rows(window[_HEAD:], count, self._shape.result_bytes, self._result_dtype)

    def _rows(self, memory: NDArray[np.uint8], count: int, row_bytes: int, dtype: torch.dtype) -> Tensor:
        if count * row_bytes > len(memory):
            raise ValueError(f"{count} rows do not fit into a window of {self._window_bytes} bytes")
        return torch.from_numpy(memory[: count * row_bytes]).view(dtype).view(count, self._shape.hidden)
