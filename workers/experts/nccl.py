"""The exchange of ranks on GPUs: NCCL through cupy, all-to-all built of grouped sends and receives.

NCCL blocks in C: joining until all have come, a post until connections stand, and what was posted runs until both sides
have. So joining has a thread of its own that can be left behind, and `abort`, by another thread, ends the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.cuda import Communicator, Cuda, DeviceError, Event, device_errors, wait_for
from workers.experts.exchange import Bound, GroupBroken, Parcel, Shape

_LOOK_S = 0.02


class NcclExchange:
    def __init__(
        self,
        cuda: Cuda,
        device: torch.device,
        unique_id: bytes,
        size: int,
        me: int,
        shape: Shape,
        timeout_s: float,
    ) -> None:
        """Raises GroupBroken when the others do not come in time."""
        self.size, self.me, self._shape = size, me, shape
        self._cuda, self._device = cuda, device
        self._dtype, self._result_dtype = getattr(torch, shape.dtype), getattr(torch, shape.result_dtype)
        self._aborted = threading.Event()
        self._stream = cuda.stream(device)
        self._others = [member for member in range(size) if member != me]
        self._communicator = self._join(unique_id, timeout_s)

    def headers(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        with self._posting():
            own = torch.from_numpy(mine).to(self._device)
            everybody = own.repeat(self.size, 1)
            event = self._trade(
                dict.fromkeys(self._others, own),
                {member: everybody[member] for member in self._others},
            )
        self._finish(event)
        return everybody.cpu().numpy()

    def dispatch(self, x: Tensor, bound: Sequence[Bound]) -> None:
        sizes = np.array([[len(one.ids), len(one.tokens)] for one in bound], np.int64)
        with self._posting():
            ours, theirs = (torch.from_numpy(sizes).to(self._device) for _ in range(2))
            event = self._trade(
                {member: ours[member] for member in self._others},
                {member: theirs[member] for member in self._others},
            )
        self._finish(event)
        counts = theirs.cpu().tolist()
        with self._posting():
            ids = {m: torch.from_numpy(bound[m].ids).to(self._device) for m in self._others}
            tokens = {m: torch.from_numpy(bound[m].tokens).to(self._device) for m in self._others}
            rows = {member: x.index_select(0, tokens[member]) for member in self._others}
            self._ids = {
                m: torch.empty((counts[m][0], 2), dtype=torch.int32, device=self._device)
                for m in self._others
            }
            self._rows = {m: self._empty(counts[m][1], self._dtype) for m in self._others}
            self._sent = ids, rows  # until they have left
            self._trade(ids, self._ids)
            self._arriving = self._trade(rows, self._rows)

    def receive(self) -> list[Parcel | None]:
        self._finish(self._arriving)
        return [
            None if member == self.me else Parcel(self._ids[member].cpu().numpy(), self._rows[member])
            for member in range(self.size)
        ]

    def room(self, counts: Sequence[int]) -> list[Tensor | None]:
        return [
            None if member == self.me else self._empty(count, self._result_dtype)
            for member, count in enumerate(counts)
        ]

    def combine(self, outputs: Sequence[Tensor | None]) -> None:
        self._outputs = {member: outputs[member] for member in self._others}

    def results(self, counts: Sequence[int]) -> list[Tensor | None]:
        with self._posting():
            back = {member: self._empty(counts[member], self._result_dtype) for member in self._others}
            outputs = {m: output.contiguous() for m, output in self._outputs.items() if output is not None}
            event = self._trade(outputs, back)
        self._finish(event)
        return [back.get(member) for member in range(self.size)]

    def abort(self) -> None:
        if not self._aborted.is_set():
            self._aborted.set()
            communicator = getattr(self, "_communicator", None)
            if communicator is not None:
                communicator.abort()

    def close(self) -> None:
        self.abort()

    # --- NCCL -------------------------------------------------------------------------------------------------------

    def _join(self, unique_id: bytes, timeout_s: float) -> Communicator:
        made: list[Communicator] = []
        failed: list[Exception] = []

        def join() -> None:
            try:
                made.append(self._cuda.join(self._device, unique_id, self.me, self.size))
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                failed.append(error)
            if given_up.is_set() and made:
                made[0].abort()

        given_up = threading.Event()
        thread = threading.Thread(target=join, name="experts-nccl", daemon=True)
        thread.start()
        deadline = time.monotonic() + timeout_s
        while thread.is_alive() and time.monotonic() < deadline and not self._aborted.is_set():
            thread.join(_LOOK_S)
        if not made:
            given_up.set()
            raise GroupBroken(
                f"NCCL could not connect: {failed[0] if failed else 'not all ranks came in time'}"
            )
        return made[0]

    def _trade(self, out: dict[int, Tensor], into: dict[int, Tensor]) -> Event:
        """Between this rank and all others; nothing travels where a tensor is empty, which both ends know."""
        with self._cuda.grouped():
            for member in self._others:
                if out[member].numel():
                    data = out[member]
                    self._communicator.send(data.data_ptr(), data.nbytes, member, self._stream)
                if into[member].numel():
                    data = into[member]
                    self._communicator.recv(data.data_ptr(), data.nbytes, member, self._stream)
        return self._stream.record()

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((count, self._shape.hidden), dtype=dtype, device=self._device)

    @contextlib.contextmanager
    def _posting(self) -> Iterator[None]:
        """torch's work goes to the exchange's stream; what NCCL refuses has broken the group."""
        self._check()
        try:
            with self._stream.use():
                yield
        except RuntimeError as error:
            raise GroupBroken(f"NCCL: {error}") from error

    def _finish(self, event: Event) -> None:
        try:
            with device_errors("NCCL"):
                wait_for(event, "the exchange", check=self._check)
        except DeviceError as error:
            raise GroupBroken(str(error)) from error

    def _check(self) -> None:
        if self._aborted.is_set():
            raise GroupBroken("the exchange was aborted")
        if error := self._communicator.error():
            raise GroupBroken(f"NCCL: {error}")
