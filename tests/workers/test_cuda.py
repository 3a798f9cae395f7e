"""The seam to cupy: what is missing is said exactly; calls arrive with the right device, stream and numbers."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.cuda import CupyCuda, DeviceError, device_errors, stream_on, wait_for

GPU = torch.device("cuda:3")


class Recorder:
    """A module whose functions write down how they are called."""

    def __init__(self, calls: list[Any], answers: dict[str, Any]) -> None:
        self._calls, self._answers = calls, answers

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._calls.append((name, *arguments))
            answer = self._answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


class Cupy:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.answers: dict[str, Any] = {"getDeviceCount": 4, "ipcOpenMemHandle": 77, "malloc": 5}
        runtime: Any = Recorder(self.calls, self.answers)
        runtime.cudaIpcMemLazyEnablePeerAccess, runtime.memcpyDeviceToDevice = 1, 3
        self.nccl: Any = Recorder(self.calls, self.answers)
        self.nccl.available, self.nccl.NCCL_UINT8 = True, 1
        self.answers["NcclCommunicator"] = self.communicator = Recorder(self.calls, self.answers)
        for name, module in (("cupy.cuda.runtime", runtime), ("cupy.cuda.nccl", self.nccl)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace())


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Cupy:
    return Cupy(monkeypatch)


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda.runtime", None)
    said = CupyCuda().lacks(nccl=False)
    assert said is not None
    assert "cupy cannot be imported" in said
    assert "pip install 'headrace[gpu]'" in said


def test_without_a_gpu(cupy: Cupy) -> None:
    cupy.answers["getDeviceCount"] = RuntimeError("cudaErrorInsufficientDriver")
    assert CupyCuda().lacks(nccl=False) == "CUDA sees no GPU: cudaErrorInsufficientDriver"
    cupy.answers["getDeviceCount"] = 0
    assert "CUDA_VISIBLE_DEVICES" in (CupyCuda().lacks(nccl=True) or "")


def test_without_libnccl(cupy: Cupy) -> None:
    cupy.nccl.available = False
    assert CupyCuda().lacks(nccl=False) is None
    assert CupyCuda().lacks(nccl=True) == "cupy finds no libnccl: pip install nvidia-nccl-cu13"


def test_only_gpus_are_driven() -> None:
    assert CupyCuda().drives(GPU)
    assert not CupyCuda().drives(torch.device("cpu"))


def test_memory_is_asked_for_on_its_device(cupy: Cupy) -> None:
    cuda = CupyCuda()
    assert cuda.allocate(GPU, 100) == 5
    assert cuda.open(GPU, b"handle") == 77
    cuda.close(GPU, 77)
    cuda.free(GPU, 5)
    assert cupy.calls == [
        ("setDevice", 3),
        ("malloc", 100),
        ("memset", 5, 0, 100),
        ("deviceSynchronize",),
        ("setDevice", 3),
        ("ipcOpenMemHandle", b"handle", 1),
        ("setDevice", 3),
        ("ipcCloseMemHandle", 77),
        ("setDevice", 3),
        ("free", 5),
    ]


def test_rows_are_copied_on_the_stream(cupy: Cupy) -> None:
    stream: Any = SimpleNamespace(handle=9)
    CupyCuda().copy_rows(1000, 64, 2000, 128, 32, 4, stream)
    assert cupy.calls == [("memcpy2DAsync", 1000, 64, 2000, 128, 32, 4, 3, 9)]


def test_a_communicator(cupy: Cupy) -> None:
    stream: Any = SimpleNamespace(handle=9)
    communicator = CupyCuda().join(GPU, b"i" * 128, 1)
    communicator.send(1000, 8, 0, stream)
    communicator.recv(2000, 4, 0, stream)
    assert communicator.error() is None
    cupy.answers["check_async_error"] = RuntimeError("NCCL_ERROR_REMOTE_ERROR")
    assert communicator.error() == "NCCL_ERROR_REMOTE_ERROR"
    communicator.abort()
    assert [call for call in cupy.calls if call[0] != "check_async_error"] == [
        ("setDevice", 3),
        ("NcclCommunicator", 2, b"i" * 128, 1),
        ("send", 1000, 8, 1, 0, 9),
        ("recv", 2000, 4, 1, 0, 9),
        ("setDevice", 3),
        ("abort",),
    ]


class _In:
    """Comes to pass at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def test_waiting_ends_with_the_event_the_deadline_or_what_is_checked() -> None:
    wait_for(_In(5), "work")
    with pytest.raises(TimeoutError, match="work did not end in time"):
        wait_for(_In(10**9), "work", time.monotonic() + 0.01)

    def broken() -> None:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        wait_for(_In(3), "work", check=broken)
    wait_for(_In(1), "work", time.monotonic() - 1, broken)


def test_errors_of_a_device_are_errors_of_the_road() -> None:
    with pytest.raises(OSError, match="copying: cudaErrorIllegalAddress") as caught:
        with device_errors("copying"):
            raise RuntimeError("cudaErrorIllegalAddress")
    assert isinstance(caught.value, DeviceError)


def test_on_a_cpu_work_is_done_at_once() -> None:
    stream = stream_on(torch.device("cpu"))
    with stream.use():
        pass
    assert stream.record().query()
