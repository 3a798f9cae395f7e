"""Stands in for `cupy.cuda.runtime` and `cupy.cuda.nccl`, with their names and signatures of cupy 14.2, in host memory.

Calls are written down. With one rank they are carried out too, so that whole measurements run.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

ID = bytes(range(128))
_BYTES = {0: 1, 2: 4, 4: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # of an element, by NCCL's number of its type


class Runtime:
    memcpyHostToDevice = 1
    memcpyDeviceToHost = 2
    memcpyDeviceToDevice = 3

    def __init__(self, free: int = 1 << 30) -> None:
        self.memory: dict[int, Any] = {}
        self.devices: set[int] = set()
        self.streams: list[int] = []
        self.free_bytes = free
        self.hang = threading.Event()
        self.hangs = False

    def setDevice(self, device: int) -> None:
        self.devices.add(device)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"Fake H100"}

    def deviceGetPCIBusId(self, device: int) -> str:
        return f"0000:{device:02d}:00.0"

    def driverGetVersion(self) -> int:
        return 13020

    def runtimeGetVersion(self) -> int:
        return 13000

    def memGetInfo(self) -> tuple[int, int]:
        return self.free_bytes, 2 << 30

    def malloc(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.memory[address]

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        for address, on_device in ((dst, kind != 2), (src, kind != 1)):
            inside = any(at <= address and address + size <= at + len(b) for at, b in self.memory.items())
            assert inside == on_device, "a copy of this kind leaves its buffer"
        ctypes.memmove(dst, src, size)

    def deviceSynchronize(self) -> None: ...

    def streamCreateWithFlags(self, flags: int) -> int:
        self.streams.append(flags)
        return 70 + len(self.streams)

    def streamSynchronize(self, stream: int) -> None:
        if self.hangs:
            self.hang.wait()

    def streamDestroy(self, stream: int) -> None: ...


class Nccl:
    available = True
    NCCL_INT8, NCCL_INT32, NCCL_INT64 = 0, 2, 4
    NCCL_FLOAT16, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = 6, 7, 8, 9
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = 0, 1, 2, 3, 4

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.calls: list[tuple[Any, ...]] = []
        self.group: list[tuple[Any, ...]] = []
        self.background_error: str | None = None
        nccl = self

        class NcclCommunicator:
            def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
                assert isinstance(commId, bytes)
                self.ranks = ndev
                nccl.calls.append(("init", ndev, commId, rank))

            def _move(self, send: int, recv: int, count: int, datatype: int) -> None:
                if self.ranks == 1:
                    ctypes.memmove(recv, send, count * _BYTES[datatype])

            def allReduce(
                self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
            ) -> None:
                nccl.calls.append(("allReduce", sendbuf, recvbuf, count, datatype, op, stream))
                self._move(sendbuf, recvbuf, count, datatype)

            def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
                nccl.calls.append(("allGather", sendbuf, recvbuf, count, datatype, stream))
                self._move(sendbuf, recvbuf, count, datatype)

            def reduceScatter(
                self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
            ) -> None:
                nccl.calls.append(("reduceScatter", sendbuf, recvbuf, recvcount, datatype, op, stream))
                self._move(sendbuf, recvbuf, recvcount, datatype)

            def broadcast(
                self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
            ) -> None:
                nccl.calls.append(("broadcast", sendbuff, recvbuff, count, datatype, root, stream))
                self._move(sendbuff, recvbuff, count, datatype)

            def reduce(
                self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int
            ) -> None:
                nccl.calls.append(("reduce", sendbuf, recvbuf, count, datatype, op, root, stream))
                self._move(sendbuf, recvbuf, count, datatype)

            def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
                nccl.calls.append(("send", sendbuf, count, datatype, peer, stream))
                nccl.group.append(("send", sendbuf, count, datatype))

            def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
                nccl.calls.append(("recv", recvbuf, count, datatype, peer, stream))
                nccl.group.append(("recv", recvbuf, count, datatype))
                if self.ranks == 1:
                    (_, source, _, _), (_, target, _, _) = nccl.group[-2:]
                    self._move(source, target, count, datatype)

            def abort(self) -> None:
                nccl.calls.append(("abort",))
                nccl.runtime.hang.set()

            def check_async_error(self) -> None:
                if nccl.background_error:
                    raise RuntimeError(nccl.background_error)

            def destroy(self) -> None:
                nccl.calls.append(("destroy",))

        self.NcclCommunicator = NcclCommunicator

    def get_version(self) -> int:
        return 23203

    def get_unique_id(self) -> bytes:
        return ID

    def groupStart(self) -> None:
        self.calls.append(("groupStart",))

    def groupEnd(self) -> None:
        self.calls.append(("groupEnd",))
        self.group.clear()
