"""Teams that need no Ray: a thread for each GPU of this host, a process for each CPU rank, or one process a rank anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kernels.nccl_tests.collectives import Collectives
from kernels.nccl_tests.errors import BackendMissing, BadArguments, RendezvousError
from kernels.nccl_tests.options import Options
from kernels.nccl_tests.rank import Rank
from kernels.nccl_tests.rendezvous import Listener, dial, follow, parse_address
from kernels.nccl_tests.team import Member, Team

LOOPBACK = "127.0.0.1"
_START_S = 120.0  # for processes to import torch on a busy machine
_END_S = 5.0
_SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
_ROOT = Path(__file__).resolve().parents[2]


def make_rank(backend: str, timeout_s: float, device: int = 0, address: str = LOOPBACK) -> Rank:
    """One rank in this process. `address` is this machine's, for gloo. Raises BackendMissing."""
    return Rank(partial(_collectives, backend, timeout_s, device, address), timeout_s)


def _collectives(backend: str, timeout_s: float, device: int, address: str) -> Collectives:
    if backend == "nccl":
        from kernels.nccl_tests.nccl_backend import NcclCollectives

        return NcclCollectives(device)
    from kernels.nccl_tests.gloo_backend import GlooCollectives

    return GlooCollectives(address, timeout_s)


def gpu_team(options: Options) -> Team:
    """Threads of this process, each with a GPU and a communicator of its own. Raises BackendMissing, BadArguments."""
    from kernels.nccl_tests.nccl_backend import num_gpus

    there = num_gpus()
    wanted = options.num_ranks or there
    devices: Sequence[int] = options.devices or range(wanted)
    if wanted > there and not options.devices:
        raise BackendMissing(f"--ngpus is {wanted}, but CUDA sees {there}")
    if max(devices) >= there:
        raise BadArguments(f"--devices names GPU {max(devices)}; CUDA sees {there}, from 0 to {there - 1}")
    if len(set(devices)) < len(devices) and os.environ.get(_SHARING) != "1":
        raise BadArguments(
            f"--devices names a GPU twice; NCCL allows that only with {_SHARING}=1 in the environment"
        )
    return Team([make_rank("nccl", options.timeout_s, device) for device in devices])


@contextmanager
def process_team(options: Options) -> Iterator[Team]:
    """CPU ranks, a process each, led by this one. Raises RendezvousError."""
    num_ranks = options.num_ranks or 2
    listener = Listener(LOOPBACK, 0)
    children: list[subprocess.Popen[bytes]] = []

    def none_ended() -> None:
        for rank, child in enumerate(children):
            if (code := child.poll()) is not None:
                raise RendezvousError(f"the process of rank {rank} ended before it began, with status {code}")

    try:
        for rank in range(num_ranks):
            command = [sys.executable, "-m", "kernels.nccl_tests", "--led", "--backend", options.backend]
            command += ["--rank", str(rank), "--world-size", str(num_ranks)]
            command += ["--init", f"{LOOPBACK}:{listener.port}", "--timeout", str(options.timeout_s)]
            children.append(subprocess.Popen(command, env=_environment(), stdin=subprocess.DEVNULL))
        found = listener.accept(set(range(num_ranks)), num_ranks, _START_S, none_ended)
        yield Team([found[rank] for rank in range(num_ranks)])
    finally:
        listener.close()
        _end(children)


@contextmanager
def leading_team(options: Options) -> Iterator[Team]:
    """Rank 0 of several processes: it is a member itself, and leads the others. Raises RendezvousError."""
    assert options.init is not None
    assert options.world_size is not None
    host, port = parse_address(options.init)
    own = make_rank(options.backend, options.timeout_s, _own_device(options), host)
    listener = Listener(host, port)
    try:
        others = set(range(1, options.world_size))
        found = listener.accept(others, options.world_size, options.timeout_s)
        members: list[Member] = [own, *(found[rank] for rank in sorted(others))]
        yield Team(members)
    finally:
        listener.close()


def follow_leader(options: Options) -> None:
    """Any rank but 0. Raises RendezvousError, BackendMissing and what a measurement raises."""
    assert options.init is not None
    assert options.rank is not None
    assert options.world_size is not None
    host, port = parse_address(options.init)
    connection = dial(host, port, options.rank, options.world_size, options.timeout_s)
    try:
        rank = make_rank(options.backend, options.timeout_s, _own_device(options), connection.own_address)
    except BackendMissing as error:
        connection.receive()  # the leader's first question
        connection.send({"error": f"rank {options.rank}: {error}"})
        raise
    follow(connection, rank)


def _own_device(options: Options) -> int:
    """The only one visible, or the one named: a process a rank is a GPU a process."""
    if len(options.devices) > 1:
        raise BadArguments("with --rank, --devices names one GPU: that of this rank")
    return options.devices[0] if options.devices else 0


def _environment() -> dict[str, str]:
    """That of this process, in which children also find our packages."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *paths]), "OMP_NUM_THREADS": "1"}


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        try:
            child.wait(0.5)
        except subprocess.TimeoutExpired:
            child.terminate()
    for child in children:
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
