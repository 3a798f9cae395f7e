"""Ranks on several machines without Ray: the leader listens, the others dial, and are asked over that connection.

One JSON object a line, none of which says more than a rank, a case or a number. Nothing authenticates it: it is for a
network that you trust, for as long as a test runs.
"""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from kernels.nccl_tests.collectives import About
from kernels.nccl_tests.errors import BadArguments, NcclTestError, RendezvousError
from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.rank import Repeats, Result, Timing
from kernels.nccl_tests.team import Member

_LONGEST_LINE = 1 << 20
_RETRY_S = 0.2
_LEADER_GONE = "rank 0 is gone"
_HELLO_S = 5.0  # that someone who dialled gets to say who it is


def parse_address(text: str) -> tuple[str, int]:
    """host:port or [IPv6]:port."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and 0 <= int(port) < 65536):
        raise BadArguments(f"--init is {text!r}; write the address of rank 0 as host:port")
    return host.strip("[]"), int(port)


class Connection:
    """Lines of JSON, one at a time in each direction."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._file = connected.makefile("rb")

    @property
    def own_address(self) -> str:
        """Of this machine, as the other side reaches it."""
        address: str = self._socket.getsockname()[0]
        return address

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise RendezvousError(f"the connection broke: {error}") from None

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """None when the other side is gone."""
        self._socket.settimeout(timeout_s)
        try:
            line = self._file.readline(_LONGEST_LINE)
        except TimeoutError:
            raise RendezvousError(f"nothing was heard for {timeout_s:g} s") from None
        except OSError:
            return None
        finally:
            self._socket.settimeout(None)
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise RendezvousError("what came is not a message of this test")
        return message

    def is_gone(self) -> bool:
        """Whether the other side has hung up, as far as can be seen now."""
        if not select.select([self._socket], [], [], 0)[0]:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class RemoteRank:
    """A member behind a connection."""

    def __init__(self, rank: int, connection: Connection) -> None:
        self._rank = rank
        self._connection = connection

    def about(self) -> About:
        return About(**self._ask("about"))

    def make_id(self) -> str:
        unique_id: str = self._ask("make_id")
        return unique_id

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self._ask("join", unique_id=unique_id, rank=rank, num_ranks=num_ranks)

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._ask("allocate", send_bytes=send_bytes, recv_bytes=recv_bytes)

    def measure(self, case: Case, repeats: Repeats) -> Result:
        answer = self._ask("measure", case=asdict(case), repeats=asdict(repeats))
        return Result(Timing(**answer["out_of_place"]), Timing(**answer["in_place"]))

    def close(self) -> None:
        self._ask("close")
        self._connection.close()

    def _ask(self, call: str, **arguments: Any) -> Any:
        try:
            self._connection.send({"call": call, "arguments": arguments})
            answer = self._connection.receive()
        except RendezvousError as error:
            raise RendezvousError(f"rank {self._rank} is gone: {error}") from None
        if answer is None:
            raise RendezvousError(
                f"rank {self._rank} is gone: its process ended or the network broke ({call})"
            )
        if "error" in answer:
            raise NcclTestError(str(answer["error"]))
        return answer.get("result")


class Listener:
    """Where the leader waits for ranks."""

    def __init__(self, host: str, port: int) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(address[:2], family=family, backlog=1024)
        except OSError as error:
            raise RendezvousError(f"rank 0 cannot listen at {host}:{port}: {error}") from None
        self.host = host
        self.port: int = self._socket.getsockname()[1]

    def accept(
        self,
        ranks: set[int],
        num_ranks: int,
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> dict[int, RemoteRank]:
        """Wait until every rank of `ranks` has dialled. Raises RendezvousError that names those that have not.

        `check` is called while it waits, and may raise.
        """
        found: dict[int, RemoteRank] = {}
        deadline = time.monotonic() + timeout_s
        while missing := ranks - found.keys():
            if time.monotonic() > deadline:
                names = ", ".join(str(rank) for rank in sorted(missing))
                raise RendezvousError(
                    f"of {num_ranks} ranks these did not come to {self.host}:{self.port} within {timeout_s:g} s: {names}"
                )
            check()
            if select.select([self._socket], [], [], _RETRY_S)[0]:
                connection = Connection(self._socket.accept()[0])
                try:
                    rank = self._hello(connection, missing, num_ranks)
                except RendezvousError as error:  # one that does not belong here stops nobody
                    self._refuse(connection, str(error))
                else:
                    connection.send({"result": None})
                    found[rank] = RemoteRank(rank, connection)
        return found

    def close(self) -> None:
        self._socket.close()

    def _hello(self, connection: Connection, missing: set[int], num_ranks: int) -> int:
        hello = connection.receive(_HELLO_S) or {}
        rank, theirs = hello.get("rank"), hello.get("num_ranks")
        if not isinstance(rank, int) or theirs != num_ranks:
            raise RendezvousError(f"--world-size is {theirs} for rank {rank}, and {num_ranks} for rank 0")
        if rank not in missing:
            raise RendezvousError(
                f"rank {rank} is not waited for: it is there already, or not below {num_ranks}"
            )
        return rank

    @staticmethod
    def _refuse(connection: Connection, message: str) -> None:
        try:
            connection.send({"error": message})
        except RendezvousError:
            pass  # gone already
        connection.close()


def dial(host: str, port: int, rank: int, num_ranks: int, timeout_s: float) -> Connection:
    """Raises RendezvousError when nobody listens in time, or the leader does not want this rank."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connected = socket.create_connection((host, port), max(0.1, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() + _RETRY_S > deadline:
                raise RendezvousError(
                    f"rank {rank} did not reach rank 0 at {host}:{port} within {timeout_s:g} s: {error}"
                ) from None
            time.sleep(_RETRY_S)
    connection = Connection(connected)
    connection.send({"rank": rank, "num_ranks": num_ranks})
    answer = connection.receive(timeout_s)
    if answer is None or "error" in answer:
        reason = answer["error"] if answer else "it hung up"
        connection.close()
        raise RendezvousError(f"rank 0 at {host}:{port} refused rank {rank}: {reason}")
    return connection


def follow(connection: Connection, member: Member) -> None:
    """Do what the leader asks until it says that all is done. Raises what the member raised, or RendezvousError.

    When the leader is gone that is raised at once, whatever the member is at: the caller should end its process.
    """
    while (request := connection.receive()) is not None:
        call = str(request.get("call"))
        try:
            result = _attended(connection, partial(_answer, member, call, request.get("arguments") or {}))
        except RendezvousError:
            raise
        except NcclTestError as error:
            connection.send({"error": str(error)})
            raise
        connection.send({"result": result})
        if call == "close":
            return
    raise RendezvousError(_LEADER_GONE)


def _attended(connection: Connection, work: Callable[[], Any]) -> Any:
    """Work on a thread of its own, while this one sees to it that somebody still wants the answer."""
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:  # noqa: BLE001 - raised below
            answers.put((None, error))

    threading.Thread(target=run, name="answer", daemon=True).start()
    while True:
        try:
            answer, error = answers.get(timeout=_RETRY_S)
        except queue.Empty:
            if connection.is_gone():
                raise RendezvousError(_LEADER_GONE) from None
            continue
        if error is not None:
            raise error
        return answer


def _answer(member: Member, call: str, arguments: dict[str, Any]) -> Any:
    match call:
        case "about":
            return asdict(member.about())
        case "make_id":
            return member.make_id()
        case "join":
            return member.join(**arguments)
        case "allocate":
            return member.allocate(**arguments)
        case "measure":
            return asdict(member.measure(Case(**arguments["case"]), Repeats(**arguments["repeats"])))
        case "close":
            return member.close()
    raise NcclTestError(f"rank 0 asks for {call!r}, which this version does not know")
