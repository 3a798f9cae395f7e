"""nccl and cuda_ipc between two processes: on GPUs where there are any, and memory of a stand-in everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.workers.transfer.fake_cuda import FakeCuda, World
from tests.workers.transfer.gpu_pair import on_gpu
from tests.workers.transfer.gpu_sender import Task
from tests.workers.transfer.pair import LAYOUT, DecodeSide, PatternEngine, at_rest, work
from workers.cuda import Cuda, CupyCuda
from workers.transfer import roads
from workers.transfer.cuda_ipc import CudaIpc
from workers.transfer.nccl import Nccl

ROOT = Path(__file__).resolve().parents[3]


class Sender:
    def __init__(
        self, device: str, allowed: list[str], compression: str = "none", dtype: str = "float32"
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.workers.transfer.gpu_sender",
            device,
            ",".join(allowed),
            compression,
            dtype,
        ]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hand_over(self, d: DecodeSide, name: str, num_tokens: int) -> dict[str, Any]:
        w = work(name, [(i * 7) % 1000 for i in range(num_tokens)])
        task = Task(w, d.reserve(w, lease_s=60.0))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(task).decode() + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()


def decode_side(
    cuda: Cuda, device: str, channels: list[str], compression: str = "none", dtype: str = "float32"
) -> DecodeSide:
    engine = PatternEngine(256, layout=msgspec.structs.replace(LAYOUT, dtype=dtype))
    memories = on_gpu(engine, cuda, device)
    return DecodeSide(engine, channels, memories=memories, io_timeout_s=20.0, compression=compression)


def check(sender: Sender, d: DecodeSide, road: str) -> dict[str, Any]:
    """Three hand-overs; what the sender said of the last."""
    for name, length in (("a", 5), ("b", 400), ("c", 33)):
        found = sender.hand_over(d, name, length)
        assert found["ended"] is None, found
        assert found["road"] == road, found
        d.wait(name)
        assert d.committed[name]
    at_rest(d)
    return found


@pytest.fixture
def senders() -> Iterator[list[Sender]]:
    found: list[Sender] = []
    yield found
    for sender in found:
        sender.end()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("fp8", marks=pytest.mark.slow)])
def test_memory_of_another_process(
    monkeypatch: pytest.MonkeyPatch, senders: list[Sender], dtype: str
) -> None:
    """The stand-in, but two processes, a unix socket and descriptors that travel over it."""
    cuda = FakeCuda(World(), "GPU D")
    monkeypatch.setitem(roads.ROADS, "cuda_ipc", CudaIpc(cuda))
    d = decode_side(cuda, "cpu", ["cuda_ipc"], dtype=dtype)
    senders.append(Sender("fake", ["cuda_ipc"], dtype=dtype))
    check(senders[0], d, "cuda_ipc")
    assert len(cuda.open_handles) == 1
    senders[0].kill()
    d.stop()


# --- with GPUs --------------------------------------------------------------------------------------------------------


def need(num_gpus: int, *, nccl: bool) -> None:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs, torch sees {found}")
    if lack := CupyCuda().lacks(nccl=nccl):
        pytest.skip(lack)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_cuda_ipc_on_one_gpu(senders: list[Sender], dtype: str) -> None:
    need(1, nccl=False)
    d = decode_side(CupyCuda(), "cuda:0", ["cuda_ipc"], dtype=dtype)
    senders.append(Sender("cuda:0", ["cuda_ipc"], dtype=dtype))
    check(senders[0], d, "cuda_ipc")
    d.stop()


@pytest.mark.gpu
def test_a_sender_that_is_killed_takes_only_its_own_requests_with_it(senders: list[Sender]) -> None:
    need(1, nccl=False)
    d = decode_side(CupyCuda(), "cuda:0", ["cuda_ipc"])
    first = Sender("cuda:0", ["cuda_ipc"])
    check(first, d, "cuda_ipc")
    first.kill()
    senders.append(Sender("cuda:0", ["cuda_ipc"]))
    found = senders[0].hand_over(d, "after", 100)
    assert found["ended"] is None, found
    d.wait("after")
    assert d.committed["after"]
    at_rest(d)
    d.stop()


@pytest.mark.gpu
def test_the_process_that_exports_memory_cannot_open_it() -> None:
    """What the roads make of it: a blocked road. Else both sides of a test could be one process."""
    need(1, nccl=False)
    cuda, device = CupyCuda(), torch.device("cuda:0")
    address = cuda.allocate(device, 1 << 20)
    with pytest.raises(RuntimeError):
        cuda.open(device, cuda.export(device, address))
    cuda.free(device, address)


@pytest.mark.gpu
def test_nccl_refuses_one_gpu_twice(senders: list[Sender]) -> None:
    need(1, nccl=True)
    d = decode_side(CupyCuda(), "cuda:0", ["nccl", "cuda_ipc"])
    senders.append(Sender("cuda:0", ["nccl", "cuda_ipc"]))
    found = check(senders[0], d, "cuda_ipc")
    assert "cuda_ipc serves that" in " ".join(found["passed_over"])
    d.stop()


@pytest.mark.gpu
def test_what_nccl_itself_says_to_one_gpu_twice(
    monkeypatch: pytest.MonkeyPatch, senders: list[Sender]
) -> None:
    """Without our check: no hang, the next road is taken."""
    need(1, nccl=True)
    monkeypatch.setattr(Nccl, "endpoint", lambda self, memory: {"device": "another"})
    d = decode_side(CupyCuda(), "cuda:0", ["nccl", "tcp"])
    senders.append(Sender("cuda:0", ["nccl", "tcp"]))
    found = check(senders[0], d, "tcp")
    assert "NCCL" in " ".join(found["passed_over"])
    d.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("compression", ["none", "int8", "fp8"])
def test_nccl_between_two_gpus(senders: list[Sender], compression: str) -> None:
    need(2, nccl=True)
    d = decode_side(CupyCuda(), "cuda:1", ["nccl"], compression)
    senders.append(Sender("cuda:0", ["nccl"], compression))
    check(senders[0], d, "nccl")
    d.stop()


@pytest.mark.gpu
def test_cuda_ipc_between_two_gpus(senders: list[Sender]) -> None:
    """Or tcp, where the two have no peer access: said, not hung."""
    need(2, nccl=False)
    d = decode_side(CupyCuda(), "cuda:1", ["cuda_ipc", "tcp"])
    senders.append(Sender("cuda:0", ["cuda_ipc", "tcp"]))
    found = senders[0].hand_over(d, "a", 400)
    d.wait("a")
    assert d.committed["a"]
    assert found["road"] == "cuda_ipc" or "peer access" in " ".join(found["passed_over"])
    d.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("compression", ["none", "int8", "fp8"])
def test_blocks_of_a_gpu_over_tcp(senders: list[Sender], compression: str) -> None:
    need(1, nccl=False)
    d = decode_side(CupyCuda(), "cuda:0", ["tcp"], compression)
    senders.append(Sender("cuda:0", ["tcp"], compression))
    check(senders[0], d, "tcp")
    d.stop()


@pytest.mark.gpu
def test_blocks_of_a_gpu_over_a_ring_in_shared_memory(senders: list[Sender]) -> None:
    need(1, nccl=False)
    d = decode_side(CupyCuda(), "cuda:0", ["shm"])
    senders.append(Sender("cuda:0", ["shm"]))
    check(senders[0], d, "shm")
    d.stop()
