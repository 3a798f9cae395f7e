"""What the machine can do at most: memcpy on one core, and bytes over loopback sockets by programs in C."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.valkey import free_port

_SOURCE = Path(__file__).with_name("socket_copy.c")


def memcpy_rate(
    destination: NDArray[np.uint8], source: NDArray[np.uint8], block_bytes: int, seed: int
) -> float:
    """Bytes per second of libc's memmove, block by block in random order, in this thread."""
    libc = ctypes.CDLL(None)
    libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    count = len(source) // block_bytes
    rng = random.Random(seed)
    to, of = rng.sample(range(count), count), rng.sample(range(count), count)
    here, there = destination.ctypes.data, source.ctypes.data
    began = time.perf_counter()
    for a, b in zip(to, of, strict=True):
        libc.memmove(here + a * block_bytes, there + b * block_bytes, block_bytes)
    return count * block_bytes / (time.perf_counter() - began)


class SocketCopy:
    """A C program that sends memory over loopback from one process to another, with sendmsg and recv."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._program = Path(self._directory.name) / "socket_copy"
        subprocess.run(["cc", "-O2", "-pthread", "-o", self._program, _SOURCE], check=True)

    def rate(self, streams: int, block_bytes: int, total_bytes: int) -> float:
        """Bytes per second of memory as large as `total_bytes`, block by block in random order."""
        command = [str(self._program), str(streams), str(block_bytes), str(total_bytes)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def iperf3_rate(streams: int, seconds: int = 2) -> float | None:
    """Bytes per second; None where iperf3 is not installed. It sends one small buffer again and again."""
    if shutil.which("iperf3") is None:
        return None
    port = str(free_port())
    server = subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port], stdout=subprocess.DEVNULL
    )
    try:
        time.sleep(0.3)
        command = ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", str(seconds), "-P", str(streams), "-J"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return float(found["end"]["sum_received"]["bits_per_second"]) / 8
    finally:
        server.terminate()
        server.wait(10)
