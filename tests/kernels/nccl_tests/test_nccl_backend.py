"""What is asked of NCCL: which function, which addresses, counts, types and peers, in which order."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from kernels.nccl_tests import nccl_backend
from kernels.nccl_tests.collectives import Region
from kernels.nccl_tests.errors import BackendMissing, CollectiveFailed, CollectiveTimeout
from kernels.nccl_tests.nccl_backend import NcclCollectives
from kernels.nccl_tests.plan import DTYPES, NO_REDOP, OPERATIONS, Case
from kernels.nccl_tests.rank import Rank, Repeats
from kernels.nccl_tests.team import Team
from tests.kernels.nccl_tests.fake_cuda import ID, Nccl, Runtime

SEND, RECV = Region("send"), Region("recv", 64)


def joined(rank: int = 1, num_ranks: int = 3) -> tuple[NcclCollectives, Nccl, int, int]:
    """A rank, and the addresses of its two buffers."""
    runtime = Runtime()
    nccl = Nccl(runtime)
    collectives = NcclCollectives(0, nccl, runtime)
    collectives.join(collectives.make_id(), rank, num_ranks)
    assert nccl.calls == [("init", num_ranks, ID, rank)]
    nccl.calls.clear()
    collectives.allocate(4096, 8192)
    send, recv, _ = runtime.memory
    return collectives, nccl, send, recv


STREAM = 71


@pytest.mark.parametrize(
    ("case", "call"),
    [
        (Case("all_reduce", "bfloat16", "max", -1, 5), ("allReduce", 0, 64, 5, 9, 2, STREAM)),
        (Case("all_gather", "half", "none", -1, 8), ("allGather", 0, 64, 8, 6, STREAM)),
        (Case("reduce_scatter", "int64", "avg", -1, 2), ("reduceScatter", 0, 64, 2, 4, 4, STREAM)),
        (Case("broadcast", "int8", "none", 2, 7), ("broadcast", 0, 64, 7, 0, 2, STREAM)),
        (Case("reduce", "double", "prod", 2, 7), ("reduce", 0, 64, 7, 8, 1, 2, STREAM)),
    ],
    ids=lambda value: value.operation if isinstance(value, Case) else "",
)
def test_a_collective(case: Case, call: tuple[Any, ...]) -> None:
    collectives, nccl, send, recv = joined()
    collectives.start(case, SEND, RECV)
    name, _, _, *rest = call
    assert nccl.calls == [(name, send, recv + 64, *rest)]


def test_sendrecv_is_a_ring_in_one_group() -> None:
    collectives, nccl, send, recv = joined(rank=2, num_ranks=3)
    collectives.start(Case("sendrecv", "float", "none", -1, 9), SEND, RECV)
    assert nccl.calls == [
        ("groupStart",),
        ("send", send, 9, 7, 0, STREAM),
        ("recv", recv + 64, 9, 7, 1, STREAM),
        ("groupEnd",),
    ]


def test_alltoall_is_every_pair_in_one_group() -> None:
    collectives, nccl, send, recv = joined()
    collectives.start(Case("alltoall", "int32", "none", -1, 4), SEND, RECV)
    assert nccl.calls == [
        ("groupStart",),
        ("send", send, 4, 2, 0, STREAM),
        ("recv", recv + 64, 4, 2, 0, STREAM),
        ("send", send + 16, 4, 2, 1, STREAM),
        ("recv", recv + 80, 4, 2, 1, STREAM),
        ("send", send + 32, 4, 2, 2, STREAM),
        ("recv", recv + 96, 4, 2, 2, STREAM),
        ("groupEnd",),
    ]


def test_a_group_is_ended_when_a_call_in_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives, nccl, _, _ = joined()

    def fail(*arguments: int) -> None:
        raise RuntimeError("NCCL_ERROR_INVALID_USAGE")

    monkeypatch.setattr(nccl.NcclCommunicator, "recv", fail)
    with pytest.raises(RuntimeError, match="INVALID_USAGE"):
        collectives.start(Case("sendrecv", "float", "none", -1, 9), SEND, RECV)
    assert nccl.calls[-1] == ("groupEnd",)


def rank_on(runtime: Runtime, nccl: Nccl, timeout_s: float = 20.0) -> Rank:
    return Rank(lambda: NcclCollectives(3, nccl, runtime), timeout_s)


def test_one_rank_runs_every_operation_and_gives_all_back() -> None:
    runtime = Runtime()
    nccl = Nccl(runtime)
    team = Team([rank_on(runtime, nccl)])
    team.join()
    team.allocate(1 << 20, 1 << 20)
    for operation in OPERATIONS.values():
        for dtype in DTYPES:
            case = Case(operation.name, dtype, "sum" if operation.reduces else NO_REDOP, 0, 20_000)
            (result,) = team.measure(case, Repeats(1, 2, 2))
            assert result.out_of_place.wrong == 0
            assert result.in_place.wrong == (0 if operation.in_place else None)
            assert result.out_of_place.seconds > 0
    assert runtime.devices == {3}
    assert runtime.streams == [1], "the stream must not wait for copies"
    team.close()
    assert nccl.calls[-1] == ("destroy",)
    assert not runtime.memory


def test_as_often_as_asked() -> None:
    runtime = Runtime()
    nccl = Nccl(runtime)
    rank = rank_on(runtime, nccl)
    rank.join(rank.make_id(), 0, 1)
    rank.allocate(64, 64)
    rank.measure(Case("broadcast", "float", "none", 0, 4), Repeats(warmup=3, iterations=5, checks=2))
    assert sum(call[0] == "broadcast" for call in nccl.calls) == 2 * (3 + 5 + 2)


def test_in_place_is_the_ranks_own_part() -> None:
    runtime = Runtime()
    nccl = Nccl(runtime)
    rank = rank_on(runtime, nccl)
    rank.join(rank.make_id(), 1, 3)
    rank.allocate(4096, 4096)
    _, recv, _ = runtime.memory
    rank.measure(Case("all_gather", "float", "none", -1, 8), Repeats(0, 1, 0))
    rank.measure(Case("reduce_scatter", "float", "sum", -1, 8), Repeats(0, 1, 0))
    calls = [call for call in nccl.calls if call[0] in ("allGather", "reduceScatter")]
    assert calls[1][1:3] == (recv + 32, recv)
    assert calls[3][1:3] == (recv, recv + 32)


def test_a_hung_collective_is_aborted_and_named() -> None:
    runtime = Runtime()
    nccl = Nccl(runtime)
    rank = rank_on(runtime, nccl, timeout_s=0.3)
    rank.join(rank.make_id(), 1, 3)
    rank.allocate(4096, 4096)
    runtime.hangs = True
    message = (
        r"rank 1: all_reduce of 16 B \(float, sum\), out of place, warm-up: not done after 0\.3 s, aborted"
    )
    with pytest.raises(CollectiveTimeout, match=message):
        rank.measure(Case("all_reduce", "float", "sum", -1, 4), Repeats(1, 1, 1))
    assert ("abort",) in nccl.calls
    rank.close()
    assert ("destroy",) not in nccl.calls, "an aborted communicator is gone"


def test_an_error_of_the_network_ends_a_hang_early() -> None:
    runtime = Runtime()
    nccl = Nccl(runtime)
    rank = rank_on(runtime, nccl, timeout_s=60)
    rank.join(rank.make_id(), 0, 2)
    rank.allocate(64, 64)
    runtime.hangs = True
    nccl.background_error = "NCCL_ERROR_SYSTEM_ERROR"
    with pytest.raises(CollectiveFailed, match=r"rank 0: reduce of 16 B .*: NCCL_ERROR_SYSTEM_ERROR"):
        rank.measure(Case("reduce", "float", "sum", 0, 4), Repeats(1, 1, 1))


def test_too_large_a_size_is_told_before_it_is_allocated() -> None:
    runtime = Runtime(free=1 << 30)
    collectives = NcclCollectives(0, Nccl(runtime), runtime)
    with pytest.raises(
        CollectiveFailed, match=r"needs 2\.00 GiB on GPU 0, of whose 2\.00 GiB 1\.00 are free"
    ):
        collectives.allocate(1 << 30, 1 << 30)
    assert not runtime.memory


def test_where_a_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    runtime = Runtime()
    about = NcclCollectives(2, Nccl(runtime), runtime).about()
    assert about.device == "GPU 2 Fake H100 [0000:02:00.0]"
    assert about.versions == {
        "NCCL": "2.32.3",
        "cupy": "14.2.0",
        "CUDA driver": "13.2",
        "CUDA runtime": "13.0",
    }


# --- what is missing -------------------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, nccl: Any, runtime: Any) -> None:
    modules = {"cupy.cuda.nccl": nccl, "cupy.cuda.runtime": runtime}

    def find(name: str) -> Any:
        if modules[name] is None:
            raise ImportError("No module named 'cupy'")
        return modules[name]

    monkeypatch.setattr(nccl_backend.importlib, "import_module", find)


def no_gpu() -> int:
    raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")


@pytest.mark.parametrize(
    ("nccl", "runtime", "said"),
    [
        (None, None, [r"pip install 'headrace\[gpu\]'"]),
        (
            types.SimpleNamespace(available=True),
            types.SimpleNamespace(getDeviceCount=no_gpu),
            ["cudaErrorNoDevice"],
        ),
        (
            types.SimpleNamespace(available=True),
            types.SimpleNamespace(getDeviceCount=lambda: 0),
            ["CUDA_VISIBLE_DEVICES"],
        ),
        (
            types.SimpleNamespace(available=False),
            types.SimpleNamespace(getDeviceCount=no_gpu),
            ["cudaErrorNoDevice", "pip install nvidia-nccl-cu13"],
        ),
    ],
    ids=["no cupy", "no GPU", "no GPU visible", "neither GPU nor libnccl"],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, nccl: Any, runtime: Any, said: list[str]
) -> None:
    install(monkeypatch, nccl, runtime)
    for part in [*said, "--backend gloo"]:
        with pytest.raises(BackendMissing, match=part):
            nccl_backend.load()


# --- with a GPU ------------------------------------------------------------------------------------------------------


def without_gpu() -> str:
    try:
        nccl_backend.num_gpus()
    except BackendMissing as error:
        return str(error)
    return ""


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_on_the_gpus_of_this_host(operation: str) -> None:
    if reason := without_gpu():
        pytest.skip(reason)
    num_ranks = nccl_backend.num_gpus()
    team = Team([Rank(lambda n=n: NcclCollectives(n), 60.0) for n in range(num_ranks)])  # type: ignore[misc]
    kind = OPERATIONS[operation]
    try:
        team.join()
        team.allocate(8 * 400_000 * num_ranks, 8 * 400_000 * num_ranks)
        for dtype in DTYPES:
            for redop in ("sum", "prod", "min", "max", "avg") if kind.reduces else (NO_REDOP,):
                for count in (16, 400_000):
                    for result in team.measure(Case(operation, dtype, redop, 0, count), Repeats(1, 3, 1)):
                        assert result.out_of_place.wrong == 0
                        assert not result.in_place.wrong
    finally:
        team.close()
