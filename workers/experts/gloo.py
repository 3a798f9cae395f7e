"""The exchange of ranks on several hosts without NCCL: torch's gloo, over TCP. Tensors on a GPU go through host memory."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from workers.experts.exchange import Bound, GroupBroken, Parcel, Shape

T = TypeVar("T")

_distributed: Any = torch.distributed  # its stubs lack what is used of gloo here

_LONGEST_PAUSE_S = 0.0005  # between two looks at whether something has come
_STEP_S = 600.0  # a peer may compute for so long; one that dies ends its connections, and is noticed at once


class GlooStore:
    """Where the members learn each other's addresses; the leader's."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family)  # left to itself the store would listen on every address
        listener.bind((address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        self._store: Any = _distributed.TCPStore(
            address,
            port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.at = f"{address} {port}"

    def close(self) -> None:
        self._store = None


class GlooExchange:
    def __init__(self, at: str, address: str, size: int, me: int, shape: Shape, timeout_s: float) -> None:
        """`address`: of this machine, for the others. Raises GroupBroken when they do not come in time."""
        self.size, self.me, self._shape = size, me, shape
        self._dtype, self._result_dtype = getattr(torch, shape.dtype), getattr(torch, shape.result_dtype)
        self._aborted = False
        self._device = torch.device("cpu")
        self._arriving: list[tuple[Any, Tensor]] = []
        self._giving: list[Tensor] = []
        host, port = at.split()
        wait = timedelta(seconds=timeout_s)

        def join() -> Any:
            self._store = _distributed.TCPStore(host, int(port), None, False, wait, wait_for_workers=False)
            # torch's own group and not `init_process_group`, which would be one for the whole process.
            gloo = _distributed.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=address)]
            options._timeout = wait
            return gloo(self._store, me, size, options)

        self._group: Any = self._tried(join)
        self._group.set_timeout(timedelta(seconds=_STEP_S))

    def headers(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        everybody = torch.empty((self.size, len(mine)), dtype=torch.int64)
        given = torch.from_numpy(mine[None])
        self._finish(self._tried(lambda: self._group._allgather_base(everybody, given)), given, everybody)
        return everybody.numpy()

    def dispatch(self, x: Tensor, bound: Sequence[Bound]) -> None:
        self._device = x.device
        self._giving.clear()
        sizes = torch.tensor([[len(one.ids), len(one.tokens)] for one in bound], dtype=torch.int64)
        sizes[self.me] = 0
        theirs = torch.empty_like(sizes)
        work = self._tried(lambda: self._group.alltoall_base(theirs, sizes, [], []))
        self._finish(work, sizes, theirs)
        others = [one for member, one in enumerate(bound) if member != self.me]
        ids = torch.from_numpy(np.concatenate([one.ids for one in others]))
        tokens = torch.from_numpy(np.concatenate([one.tokens for one in others])).to(x.device)
        rows = x.index_select(0, tokens).cpu()
        self._arriving = [
            self._send(ids, sizes[:, 0].tolist(), theirs[:, 0].tolist()),
            self._send(rows, sizes[:, 1].tolist(), theirs[:, 1].tolist()),
        ]
        self._sizes = theirs.tolist()

    def receive(self) -> list[Parcel | None]:
        ids, rows = (self._arrived(one) for one in self._arriving)
        parcels: list[Parcel | None] = []
        first_id = first_row = 0
        for member, (num_ids, num_rows) in enumerate(self._sizes):
            parcel = Parcel(
                ids[first_id : first_id + num_ids].numpy(),
                rows[first_row : first_row + num_rows].to(self._device),
            )
            parcels.append(None if member == self.me else parcel)
            first_id, first_row = first_id + num_ids, first_row + num_rows
        return parcels

    def room(self, counts: Sequence[int]) -> list[Tensor | None]:
        return [
            None if member == self.me else torch.empty((count, self._shape.hidden), dtype=self._result_dtype)
            for member, count in enumerate(counts)
        ]

    def combine(self, outputs: Sequence[Tensor | None]) -> None:
        self._back = [
            torch.empty((0, self._shape.hidden), dtype=self._result_dtype)
            if output is None or member == self.me
            else output.cpu()
            for member, output in enumerate(outputs)
        ]

    def results(self, counts: Sequence[int]) -> list[Tensor | None]:
        wanted = [0 if member == self.me else count for member, count in enumerate(counts)]
        # Only here is it known how much comes back.
        arriving = self._send(torch.cat(self._back), [len(one) for one in self._back], wanted)
        parts = torch.split(self._arrived(arriving), wanted)
        return [None if member == self.me else part.to(self._device) for member, part in enumerate(parts)]

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._aborted = True

    def _send(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Any, Tensor]:
        arriving = torch.empty((sum(received), rows.shape[1]), dtype=rows.dtype)
        # As bytes: gloo has no bfloat16.
        width = rows.shape[1] * rows.element_size()
        out, given = arriving.view(-1).view(torch.uint8), rows.reshape(-1).view(torch.uint8)
        out_sizes, in_sizes = [n * width for n in received], [n * width for n in sent]
        work = self._tried(lambda: self._group.alltoall_base(out, given, out_sizes, in_sizes))
        self._giving.append(given)  # until it has arrived
        return work, arriving

    def _arrived(self, arriving: tuple[Any, Tensor]) -> Tensor:
        work, rows = arriving
        self._finish(work, rows, *self._giving)
        return rows

    def _finish(self, work: Any, *memory: Tensor) -> None:
        """gloo can't be interrupted while it waits for a peer that lives: what is given up is left to a thread."""
        pause = 0.0
        while not work.is_completed():
            if self._aborted:
                leave = (self._group, self._store, work, memory)
                threading.Thread(target=_keep, args=leave, name="experts-gloo-left", daemon=True).start()
                raise GroupBroken("the exchange was aborted")
            time.sleep(pause)
            pause = min(pause * 2 or 0.00002, _LONGEST_PAUSE_S)
        self._tried(work.wait)

    def _tried(self, call: Callable[[], T]) -> T:
        if self._aborted:
            raise GroupBroken("the exchange was aborted")
        try:
            return call()
        except RuntimeError as error:  # all that gloo has: a lost peer, a time-out, an abort
            raise GroupBroken(f"gloo: {error}") from error


def _keep(*what: Any) -> None:
    """Hold what gloo may still write to, and whose end would wait for it."""
    time.sleep(2 * _STEP_S)
