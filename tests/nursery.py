"""Processes that cost milliseconds: one, the nursery, has imported everything and forks the others.

A child's program is a function `program(config, fd)` of a module that the nursery has imported; what it returns is its
exit status. `fd` is the child's own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Child:
    """A process that the nursery has forked, as far as subprocess.Popen shows one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd: int | None = os.pidfd_open(pid)

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether it has, after so long at most."""
        if self._pidfd is not None:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(timeout_s * 1000):
                return False
            os.close(self._pidfd)
            self._pidfd = None
        return True

    def signal(self, how: signal.Signals) -> None:
        """Nothing where it has ended."""
        if not self.ended():
            assert self._pidfd is not None
            signal.pidfd_send_signal(self._pidfd, how)


class Nursery:
    def __init__(self, program: str, **environment: str) -> None:
        """`program`: "module:function"."""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the nursery
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery", program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )
        theirs.close()

    def fork(self, config: dict[str, Any], fd: int) -> Child:
        socket.send_fds(self._control, [json.dumps(config).encode()], [fd])
        answer = self._control.recv(100)
        if not answer:
            raise RuntimeError(f"the nursery has ended: {self.complaints()}")
        # It is reaped by nobody before this byte: until then the number is its own.
        child = Child(int(answer))
        self._control.sendall(b".")
        return child

    def close(self) -> None:
        self._control.close()
        self._process.wait(10)

    def complaints(self) -> str:
        """What all of them have written to stderr."""
        self._log.seek(0)
        return self._log.read()


def nurse(program: str, control: socket.socket) -> int:
    """Forks until the control connection ends; in a child, runs it and returns its exit status."""
    module, _, function = program.partition(":")
    run = getattr(importlib.import_module(module), function)
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not message:
            os._exit(0)  # children may still be ending
        pid = os.fork()
        if pid == 0:
            control.close()
            return int(run(json.loads(message), fds[0]) or 0)
        for fd in fds:
            os.close(fd)
        control.sendall(str(pid).encode())
        control.recv(1)
        reap()


def reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


if __name__ == "__main__":
    sys.exit(nurse(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))))
