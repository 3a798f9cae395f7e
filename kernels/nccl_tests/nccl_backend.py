"""NCCL through cupy. Only NCCL, memory and streams are used: nothing is compiled for the GPU, so no CUDA toolkit is needed.

Of cupy's runtime the plain functions with addresses as numbers serve best, since NCCL's functions take numbers too.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.nccl_tests.collectives import About, Region
from kernels.nccl_tests.errors import BackendMissing, CollectiveFailed
from kernels.nccl_tests.plan import DTYPES, NO_REDOP, OPERATIONS, Case

_DTYPES = {
    "int8": "NCCL_INT8",
    "int32": "NCCL_INT32",
    "int64": "NCCL_INT64",
    "half": "NCCL_FLOAT16",
    "bfloat16": "NCCL_BFLOAT16",
    "float": "NCCL_FLOAT32",
    "double": "NCCL_FLOAT64",
}
_NON_BLOCKING = 1  # cudaStreamNonBlocking: copies on the default stream do not wait for a hung collective
_BARRIER_BYTES = 4
_OTHERWISE = "On CPUs the same test runs with --backend gloo."


def load() -> tuple[Any, Any]:
    """cupy's `nccl` and its `runtime`. Raises BackendMissing with everything that is missing."""
    missing = []
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
        runtime = importlib.import_module("cupy.cuda.runtime")
    except ImportError as error:
        missing.append(f"cupy cannot be imported ({error}): pip install 'headrace[gpu]'")
        if not any(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*")):
            missing.insert(0, "no NVIDIA GPU is visible (no /dev/nvidia0)")
    else:
        try:
            if runtime.getDeviceCount() < 1:
                missing.append("CUDA sees no NVIDIA GPU (is CUDA_VISIBLE_DEVICES empty?)")
        except RuntimeError as error:  # CUDARuntimeError
            missing.append(f"CUDA sees no NVIDIA GPU: {error}")
        if not getattr(nccl, "available", False):
            missing.append("cupy found no libnccl: pip install nvidia-nccl-cu13")
    if missing:
        raise BackendMissing(f"NCCL cannot run here: {'; '.join(missing)}. {_OTHERWISE}")
    return nccl, runtime


def num_gpus() -> int:
    """GPUs that CUDA sees; raises BackendMissing."""
    _, runtime = load()
    count: int = runtime.getDeviceCount()
    return count


class NcclCollectives:
    """One rank on one GPU, with a communicator and a stream of its own.

    The ranks of one process are a thread each. Every method selects the device first: it belongs to the thread.
    """

    def __init__(self, device: int, nccl: Any = None, runtime: Any = None) -> None:
        if nccl is None or runtime is None:
            nccl, runtime = load()
        self._nccl, self._cuda = nccl, runtime
        self._device = device
        self._communicator: Any = None
        self._rank = 0
        self._num_ranks = 1
        self._stream = 0
        self._buffers: dict[str, int] = {}
        self._run: dict[str, Callable[[Case, int, int], None]] = {
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
        properties = self._cuda.getDeviceProperties(self._device)
        name = properties["name"]
        bus = self._cuda.deviceGetPCIBusId(self._device)
        cupy = importlib.import_module("cupy")
        return About(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=f"GPU {self._device} {name.decode() if isinstance(name, bytes) else name} [{bus}]",
            device_key=bus,
            versions={
                "NCCL": _nccl_version(self._nccl.get_version()),
                "cupy": cupy.__version__,
                "CUDA driver": _cuda_version(self._cuda.driverGetVersion()),
                "CUDA runtime": _cuda_version(self._cuda.runtimeGetVersion()),
            },
        )

    def make_id(self) -> str:
        self._cuda.setDevice(self._device)
        unique_id: bytes = self._nccl.get_unique_id()
        return unique_id.hex()

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self._cuda.setDevice(self._device)
        self._rank, self._num_ranks = rank, num_ranks
        self._communicator = self._nccl.NcclCommunicator(num_ranks, bytes.fromhex(unique_id), rank)
        self._stream = self._cuda.streamCreateWithFlags(_NON_BLOCKING)

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._cuda.setDevice(self._device)
        free, total = self._cuda.memGetInfo()
        needed = send_bytes + recv_bytes + _BARRIER_BYTES
        if needed > free:
            raise CollectiveFailed(
                f"the largest size needs {needed / 2**30:.2f} GiB on GPU {self._device}, of whose {total / 2**30:.2f} GiB "
                f"{free / 2**30:.2f} are free; choose a smaller --maxbytes"
            )
        # The barrier's comes last: whoever can allocate it has allocated all.
        for name, num_bytes in (("send", send_bytes), ("recv", recv_bytes), ("barrier", _BARRIER_BYTES)):
            self._buffers[name] = self._cuda.malloc(num_bytes)

    def fill(self, to: Region, pattern: NDArray[np.uint8], num_bytes: int) -> None:
        """One copy from the host, then doubled on the device."""
        self._cuda.setDevice(self._device)
        at = self._address(to)
        done = min(len(pattern), num_bytes)
        self._cuda.memcpy(at, pattern.ctypes.data, done, self._cuda.memcpyHostToDevice)
        while done < num_bytes:
            size = min(done, num_bytes - done)
            self._cuda.memcpy(at + done, at, size, self._cuda.memcpyDeviceToDevice)
            done += size
        self._cuda.deviceSynchronize()  # copies within a device do not wait, and our stream not for them

    def read(self, region: Region, num_bytes: int) -> NDArray[np.uint8]:
        self._cuda.setDevice(self._device)
        data = np.empty(num_bytes, np.uint8)
        self._cuda.memcpy(data.ctypes.data, self._address(region), num_bytes, self._cuda.memcpyDeviceToHost)
        return data

    def start(self, case: Case, send: Region, recv: Region) -> None:
        self._run[case.operation](case, self._address(send), self._address(recv))

    def synchronize(self) -> None:
        self._cuda.streamSynchronize(self._stream)

    def barrier(self) -> None:
        at = self._buffers["barrier"]
        self._communicator.allReduce(at, at, 1, self._nccl.NCCL_INT32, self._nccl.NCCL_SUM, self._stream)
        self._cuda.streamSynchronize(self._stream)

    def abort(self) -> None:
        if self._communicator is not None:  # while ranks still join there is no handle to abort
            self._communicator.abort()

    def error(self) -> str | None:
        if self._communicator is not None:
            try:
                self._communicator.check_async_error()
            except RuntimeError as error:  # NcclError
                return str(error)
        return None

    def close(self) -> None:
        self._cuda.setDevice(self._device)
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None
            self._cuda.streamDestroy(self._stream)
        while self._buffers:
            self._cuda.free(self._buffers.popitem()[1])

    # --- the operations, with addresses ------------------------------------------------------------------------------

    def _all_reduce(self, case: Case, send: int, recv: int) -> None:
        self._communicator.allReduce(
            send, recv, case.count, self._dtype(case), self._redop(case), self._stream
        )

    def _all_gather(self, case: Case, send: int, recv: int) -> None:
        self._communicator.allGather(send, recv, case.count, self._dtype(case), self._stream)

    def _reduce_scatter(self, case: Case, send: int, recv: int) -> None:
        self._communicator.reduceScatter(
            send, recv, case.count, self._dtype(case), self._redop(case), self._stream
        )

    def _broadcast(self, case: Case, send: int, recv: int) -> None:
        self._communicator.broadcast(send, recv, case.count, self._dtype(case), case.root, self._stream)

    def _reduce(self, case: Case, send: int, recv: int) -> None:
        self._communicator.reduce(
            send, recv, case.count, self._dtype(case), self._redop(case), case.root, self._stream
        )

    def _sendrecv(self, case: Case, send: int, recv: int) -> None:
        """A ring: to the next rank, from the one before."""
        after, before = (self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks
        self._nccl.groupStart()
        try:
            self._communicator.send(send, case.count, self._dtype(case), after, self._stream)
            self._communicator.recv(recv, case.count, self._dtype(case), before, self._stream)
        finally:
            self._nccl.groupEnd()

    def _alltoall(self, case: Case, send: int, recv: int) -> None:
        """cupy has no ncclAllToAll: every pair sends and receives, all in one group."""
        step = case.count * DTYPES[case.dtype].num_bytes
        self._nccl.groupStart()
        try:
            for peer in range(self._num_ranks):
                self._communicator.send(send + peer * step, case.count, self._dtype(case), peer, self._stream)
                self._communicator.recv(recv + peer * step, case.count, self._dtype(case), peer, self._stream)
        finally:
            self._nccl.groupEnd()

    def _address(self, region: Region) -> int:
        return self._buffers[region.buffer] + region.first_byte

    def _dtype(self, case: Case) -> int:
        number: int = getattr(self._nccl, _DTYPES[case.dtype])
        return number

    def _redop(self, case: Case) -> int:
        assert case.redop != NO_REDOP
        number: int = getattr(self._nccl, f"NCCL_{case.redop.upper()}")
        return number


def _nccl_version(code: int) -> str:
    """2.32.3 of 23203."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _cuda_version(code: int) -> str:
    """13.2 of 13020."""
    return f"{code // 1000}.{code // 10 % 100}"
