"""The same collectives on CPUs, by torch's gloo. It shows that the program and the network work; its numbers are not NCCL's.

gloo works in place, so an out-of-place operation is a copy and then the operation; both are timed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.nccl_tests.collectives import About, Region
from kernels.nccl_tests.errors import BackendMissing
from kernels.nccl_tests.plan import DTYPES, OPERATIONS, Case

_TORCH_DTYPES = {"half": "float16", "float": "float32", "double": "float64"}  # others have torch's names
_LATER_S = 1.0  # than the watchdog, which names operation, size and rank
_REDOPS = {"sum": "SUM", "prod": "PRODUCT", "min": "MIN", "max": "MAX", "avg": "AVG"}


class GlooCollectives:
    """One rank. `address` is that of this machine which the other ranks can reach."""

    def __init__(self, address: str, timeout_s: float) -> None:
        try:
            import torch
            import torch.distributed as distributed
        except ImportError as error:
            raise BackendMissing(f"gloo comes with torch, which cannot be imported: {error}") from None
        if not (distributed.is_available() and distributed.is_gloo_available()):
            raise BackendMissing("this torch was built without gloo")
        self._torch = torch
        self._distributed: Any = distributed  # whose stubs lack what is used of gloo here
        self._address = address
        self._timeout = timedelta(seconds=timeout_s + _LATER_S)
        self._store: Any = None
        self._own_store: Any = None
        self._group: Any = None
        self._rank = 0
        self._num_ranks = 1
        self._buffers: dict[str, Any] = {}
        self._run: dict[str, Callable[[Case, Any, Any], None]] = {
            "all_reduce": self._all_reduce,
            "all_gather": self._all_gather,
            "reduce_scatter": self._reduce_scatter,
            "broadcast": self._broadcast,
            "reduce": self._reduce,
            "sendrecv": self._sendrecv,
            "alltoall": self._alltoall,
        }
        assert self._run.keys() == OPERATIONS.keys()

    def about(self) -> About:
        return About(
            host=socket.gethostname(),
            pid=os.getpid(),
            device="CPU",
            device_key="cpu",
            versions={"torch": self._torch.__version__},
        )

    def make_id(self) -> str:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.socket(family)  # left to itself the store would listen on every address
        listener.bind((self._address, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        self._own_store = self._distributed.TCPStore(
            self._address,
            port,
            None,
            True,
            self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return f"{self._address} {port}"

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        # torch's own group and not `init_process_group`, which would be one for the whole process.
        gloo = self._distributed.ProcessGroupGloo
        host, port = unique_id.split()
        self._rank, self._num_ranks = rank, num_ranks
        self._store = self._distributed.TCPStore(
            host, int(port), None, False, self._timeout, wait_for_workers=False
        )
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address)]
        options._timeout = self._timeout
        self._group = gloo(self._store, rank, num_ranks, options)

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        for name, num_bytes in (("send", send_bytes), ("recv", recv_bytes)):
            self._buffers[name] = self._torch.empty(num_bytes, dtype=self._torch.uint8)

    def fill(self, to: Region, pattern: NDArray[np.uint8], num_bytes: int) -> None:
        array = self._bytes(to, num_bytes)
        done = min(len(pattern), num_bytes)
        array[:done] = pattern[:done]
        while done < num_bytes:
            size = min(done, num_bytes - done)
            array[done : done + size] = array[:size]
            done += size

    def read(self, region: Region, num_bytes: int) -> NDArray[np.uint8]:
        return self._bytes(region, num_bytes)

    def start(self, case: Case, send: Region, recv: Region) -> None:
        counts = case.counts(self._num_ranks)
        self._run[case.operation](
            case, self._elements(send, counts.send, case), self._elements(recv, counts.recv, case)
        )

    def synchronize(self) -> None:
        """Nothing to do: every operation here is waited for when it is started."""

    def barrier(self) -> None:
        self._group.barrier().wait()

    def abort(self) -> None:
        """gloo ends by itself when its time is over."""

    def error(self) -> str | None:
        return None

    def close(self) -> None:
        self._group = self._store = self._own_store = None
        self._buffers.clear()

    # --- the operations, with tensors --------------------------------------------------------------------------------

    def _all_reduce(self, case: Case, send: Any, recv: Any) -> None:
        options = self._distributed.AllreduceOptions()
        options.reduceOp = self._redop(case)
        _copy(send, recv)
        self._group.allreduce([recv], options).wait()

    def _all_gather(self, case: Case, send: Any, recv: Any) -> None:
        self._group._allgather_base(recv, send).wait()

    def _reduce_scatter(self, case: Case, send: Any, recv: Any) -> None:
        options = self._distributed.ReduceScatterOptions()
        options.reduceOp = self._redop(case)
        self._group._reduce_scatter_base(recv, send, options).wait()

    def _broadcast(self, case: Case, send: Any, recv: Any) -> None:
        options = self._distributed.BroadcastOptions()
        options.rootRank = case.root
        if self._rank == case.root:
            _copy(send, recv)
        self._group.broadcast([recv], options).wait()

    def _reduce(self, case: Case, send: Any, recv: Any) -> None:
        options = self._distributed.ReduceOptions()
        options.reduceOp, options.rootRank = self._redop(case), case.root
        _copy(send, recv)
        self._group.reduce([recv], options).wait()

    def _sendrecv(self, case: Case, send: Any, recv: Any) -> None:
        if self._num_ranks == 1:  # gloo has no connection to itself
            _copy(send, recv)
            return
        after, before = (self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks
        sending = self._group.send([send], after, 0)
        self._group.recv([recv], before, 0).wait()
        sending.wait()

    def _alltoall(self, case: Case, send: Any, recv: Any) -> None:
        self._group.alltoall_base(recv, send, [], []).wait()

    def _redop(self, case: Case) -> Any:
        return getattr(self._distributed.ReduceOp, _REDOPS[case.redop])

    def _bytes(self, region: Region, num_bytes: int) -> NDArray[np.uint8]:
        array: NDArray[np.uint8] = self._buffers[region.buffer].numpy()
        return array[region.first_byte : region.first_byte + num_bytes]

    def _elements(self, region: Region, count: int, case: Case) -> Any:
        num_bytes = count * DTYPES[case.dtype].num_bytes
        whole = self._buffers[region.buffer][region.first_byte : region.first_byte + num_bytes]
        return whole.view(getattr(self._torch, _TORCH_DTYPES.get(case.dtype, case.dtype)))


def _copy(send: Any, recv: Any) -> None:
    if send.data_ptr() != recv.data_ptr():
        recv.copy_(send)
