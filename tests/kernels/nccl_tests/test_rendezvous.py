"""Ranks that dial rank 0: who is let in, what is asked over the connection, and who leaves."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kernels.nccl_tests.collectives import About
from kernels.nccl_tests.errors import BadArguments, CollectiveTimeout, NcclTestError, RendezvousError
from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.rank import Repeats, Result, Timing
from kernels.nccl_tests.rendezvous import Listener, RemoteRank, dial, follow, parse_address
from kernels.nccl_tests.team import Team

CASE, REPEATS = Case("reduce", "half", "max", 1, 40), Repeats(1, 2, 3)
HOST = "127.0.0.1"


class FakeMember:
    """Writes down what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[Any] = []
        self._error = error

    def about(self) -> About:
        return About("host-a", 7, "GPU 0", "bus", {"NCCL": "2.32.3"})

    def make_id(self) -> str:
        return "00ff"

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self.calls.append((unique_id, rank, num_ranks))

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self.calls.append((send_bytes, recv_bytes))

    def measure(self, case: Case, repeats: Repeats) -> Result:
        self.calls.append((case, repeats))
        if self._error:
            raise self._error
        return Result(Timing(0.5, 0), Timing(0.25, None))

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener(HOST, 0)
    yield listening
    listening.close()


class Follower(threading.Thread):
    def __init__(self, listener: Listener, rank: int, num_ranks: int, member: FakeMember) -> None:
        super().__init__(daemon=True)
        self._where = (HOST, listener.port, rank, num_ranks, 10.0)
        self._member = member
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            follow(dial(*self._where), self._member)
        except NcclTestError as error:
            self.error = error


def test_a_whole_run(listener: Listener) -> None:
    members = [FakeMember() for _ in range(3)]
    followers = [Follower(listener, rank, 3, members[rank]) for rank in (2, 1)]
    found = listener.accept({1, 2}, 3, 10.0)
    team = Team([members[0], found[1], found[2]])
    assert team.about() == [members[0].about()] * 3
    team.join()
    team.allocate(10, 20)
    assert team.measure(CASE, REPEATS) == [Result(Timing(0.5, 0), Timing(0.25, None))] * 3
    team.close()
    for follower in followers:
        follower.join(10)
        assert follower.error is None
    for rank, member in enumerate(members):
        assert member.calls == [("00ff", rank, 3), (10, 20), (CASE, REPEATS), "close"]


def test_a_failure_there_is_said_here(listener: Listener) -> None:
    error = CollectiveTimeout("rank 1: reduce of 80 B: not done after 60 s, aborted")
    follower = Follower(listener, 1, 2, FakeMember(error))
    remote = listener.accept({1}, 2, 10.0)[1]
    with pytest.raises(NcclTestError, match="rank 1: reduce of 80 B: not done after 60 s, aborted"):
        remote.measure(CASE, REPEATS)
    follower.join(10)
    assert follower.error is error


def test_ranks_that_do_not_come_are_named(listener: Listener) -> None:
    Follower(listener, 2, 4, FakeMember())
    with pytest.raises(RendezvousError, match=r"of 4 ranks these did not come .* within 1 s: 1, 3"):
        listener.accept({1, 2, 3}, 4, 1.0)


def test_those_that_do_not_belong_are_refused_and_stop_nobody(listener: Listener) -> None:
    found: dict[int, RemoteRank] = {}
    accepting = threading.Thread(target=lambda: found.update(listener.accept({1, 2}, 3, 10.0)))
    accepting.start()
    with socket.create_connection((HOST, listener.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert (
            json.loads(stranger.makefile().readline())["error"] == "what came is not a message of this test"
        )
    with pytest.raises(
        RendezvousError, match="refused rank 1: --world-size is 5 for rank 1, and 3 for rank 0"
    ):
        dial(HOST, listener.port, 1, 5, 5.0)
    first = dial(HOST, listener.port, 1, 3, 5.0)
    with pytest.raises(RendezvousError, match="rank 1 is not waited for: it is there already"):
        dial(HOST, listener.port, 1, 3, 5.0)
    second = dial(HOST, listener.port, 2, 3, 5.0)
    accepting.join(10)
    assert set(found) == {1, 2}
    first.close()
    second.close()


def test_a_rank_that_goes_away_is_named(listener: Listener) -> None:
    connections: list[Any] = []
    dialling = threading.Thread(target=lambda: connections.append(dial(HOST, listener.port, 1, 2, 5.0)))
    dialling.start()
    remote = listener.accept({1}, 2, 10.0)[1]
    dialling.join()
    connections[0].close()
    with pytest.raises(RendezvousError, match="rank 1 is gone"):
        remote.measure(CASE, REPEATS)


def test_a_leader_that_goes_away_ends_its_followers() -> None:
    listening = Listener(HOST, 0)
    follower = Follower(listening, 1, 2, FakeMember())
    remote = listening.accept({1}, 2, 10.0)[1]
    remote._connection.close()
    follower.join(10)
    assert str(follower.error) == "rank 0 is gone"
    listening.close()


def test_a_leader_that_goes_away_in_the_middle_is_noticed_at_once() -> None:
    class Busy(FakeMember):
        def measure(self, case: Case, repeats: Repeats) -> Result:
            started.set()
            threading.Event().wait()
            raise AssertionError

    started = threading.Event()
    listening = Listener(HOST, 0)
    follower = Follower(listening, 1, 2, Busy())
    remote = listening.accept({1}, 2, 10.0)[1]

    def ask() -> None:
        with pytest.raises(NcclTestError):
            remote.measure(CASE, REPEATS)

    threading.Thread(target=ask, daemon=True).start()
    assert started.wait(10)
    remote._connection._socket.shutdown(socket.SHUT_RDWR)
    follower.join(10)
    assert str(follower.error) == "rank 0 is gone"
    listening.close()


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
        with pytest.raises(
            RendezvousError, match=rf"rank 3 did not reach rank 0 at {HOST}:{port} within 0\.3 s"
        ):
            dial(HOST, port, 3, 4, 0.3)


def test_a_port_that_is_taken(listener: Listener) -> None:
    with pytest.raises(RendezvousError, match=f"rank 0 cannot listen at {HOST}:{listener.port}"):
        Listener(HOST, listener.port)


def test_an_unknown_question_is_refused(listener: Listener) -> None:
    follower = Follower(listener, 1, 2, FakeMember())
    remote = listener.accept({1}, 2, 10.0)[1]
    with pytest.raises(NcclTestError, match="asks for '__class__', which this version does not know"):
        remote._ask("__class__")
    follower.join(10)


def test_addresses() -> None:
    assert parse_address("node-1:29500") == ("node-1", 29500)
    assert parse_address("[::1]:5") == ("::1", 5)
    for wrong in ("node-1", "node-1:", ":29500", "node-1:x", "node-1:99999"):
        with pytest.raises(BadArguments, match="write the address of rank 0 as host:port"):
            parse_address(wrong)
