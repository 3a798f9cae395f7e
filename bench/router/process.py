"""The processes of this benchmark: each on a core of its own, each ended with this one, each watched by its CPU clock."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_READY_S = 60.0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, to the nanosecond (the clock of clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def pin(core: int) -> None:
    """This process and those it starts; a core that the machine lacks is left out."""
    if core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})


class Child:
    """`python -m module`, told what to do by one line of JSON, ready when it has answered one. Its stdin's end ends it."""

    def __init__(self, module: str, core: int, **told: Any) -> None:
        """Raises RuntimeError when it does not become ready."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"core": core, **told}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} ended with {self._process.wait(_READY_S)} before it was ready")
        self.answer: dict[str, Any] = json.loads(line)
        self.pid = self._process.pid

    def tell(self, **order: Any) -> None:
        """Returns when it has done so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"process {self.pid} has ended")

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def told() -> dict[str, Any]:
    """In a child: what it is to do. Pins it to its core."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.raw.readline())
    pin(order.pop("core"))
    return order


def listen(do: Callable[[dict[str, Any]], None], over: Callable[[], None]) -> None:
    """In a child, on its event loop: what it is told later, a line at a time, until the parent has enough."""
    loop = asyncio.get_running_loop()
    received = bytearray()

    def heard() -> None:
        data = os.read(0, 1 << 20)
        if not data:
            loop.remove_reader(0)
            over()
            return
        received.extend(data)
        if received.endswith(b"\n"):
            do(json.loads(received))
            received.clear()
            ready()

    loop.add_reader(0, heard)


def ready(**answer: Any) -> None:
    """In a child: tells the parent, who waits."""
    print(json.dumps(answer), flush=True)
