"""The ranks of one replica as a group of torch.distributed: NCCL on GPUs, gloo on CPUs.

The group is the replica's own. torch's default group, of which a process has one, stays free for others.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from workers.parallel.shard import Shard

_distributed: Any = torch.distributed  # its stubs lack what is used here

_STEP_S = (
    600.0  # a rank may compute for so long; one that dies is noticed by its connection to rank 0, at once
)


class GroupError(RuntimeError):
    """The ranks did not come together, or one of them was lost."""


def open_store(at: str, timeout_s: float) -> Any:
    """torch's store at "host port". Raises GroupError."""
    host, port = at.split()
    try:
        return _distributed.TCPStore(
            host, int(port), None, False, timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except RuntimeError as error:
        raise GroupError(f"the store of the ranks at {at}: {error}") from error


class RankGroup:
    """See `workers.parallel.collectives.Parallel`. Used by one thread at a time."""

    def __init__(
        self,
        store: Any,
        shard: Shard,
        device: torch.device,
        timeout_s: float,
        collectives: Literal["auto", "nccl", "gloo"] = "auto",
    ) -> None:
        """`store`: torch's, of all ranks. Returns when all have come. Raises GroupError."""
        self.shard = shard
        self._store = store  # the group goes on using it
        wait = timedelta(seconds=timeout_s)
        try:
            on_gpus = device.type == "cuda" and collectives == "auto"
            join = _nccl if on_gpus or collectives == "nccl" else _gloo
            self._group = join(store, shard, device, wait)
            here = torch.zeros(1, dtype=torch.int32, device=device)
            self.all_reduce(here)  # NCCL connects with the first collective, which belongs to the start
            self._allow(timedelta(seconds=_STEP_S))
        except RuntimeError as error:
            raise GroupError(f"{shard.size} ranks on {device} did not come together: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        options = _distributed.AllreduceOptions()
        options.asyncOp = False  # NCCL: on the current stream, not on one of the group's beside it
        self._wait(self._group.allreduce([x], options))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        size = self.shard.size
        everybody = x.new_empty((size * rows, columns))
        options = _distributed.distributed_c10d.AllgatherOptions()
        options.asyncOp = False
        self._wait(self._group._allgather_base(everybody, x.contiguous(), options))
        return everybody.view(size, rows, columns).transpose(0, 1).reshape(rows, size * columns)

    def broadcast(self, x: Tensor) -> None:
        options = _distributed.BroadcastOptions()
        options.rootRank, options.asyncOp = 0, False
        self._wait(self._group.broadcast([x], options))

    def close(self) -> threading.Thread:
        """End what runs, wake who waits here, and give connections and threads back. Idempotent.

        In a thread, because NCCL may wait for a device; a process that ends before it has may abort.
        """
        closing = threading.Thread(target=self._close, name="ranks-part", daemon=True)
        closing.start()
        return closing

    def _close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()
        del group
        self._store = None

    def _allow(self, step: timedelta) -> None:
        """So long a rank may wait for the others in a step."""
        self._group._set_default_timeout(step)

    def _wait(self, work: Any) -> None:
        """gloo: until it is done. NCCL: only the current stream waits."""
        if work is not None:
            work.wait()


def _gloo(store: Any, shard: Shard, device: torch.device, wait: timedelta) -> Any:
    gloo = _distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]  # the ranks of a replica share a host
    options._timeout = wait
    return gloo(store, shard.rank, shard.size, options)


def _nccl(store: Any, shard: Shard, device: torch.device, wait: timedelta) -> Any:
    if not _distributed.is_nccl_available():
        raise RuntimeError("this torch was built without NCCL")
    torch.cuda.set_device(device)
    nccl = _distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = wait
    return nccl(store, shard.rank, shard.size, options)


def own_device(device: torch.device, rank: int) -> torch.device:
    """A rank's GPU: the only one that it sees, or the one of its number, which `cuda` alone means from here on."""
    if device.type != "cuda":
        return device
    own = torch.device("cuda", rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(own)
    return own
