from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.valkey import EmbeddedValkey, ValkeyError, free_port

ROOT = Path(__file__).resolve().parents[2]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_it_starts_answers_and_ends() -> None:
    server = EmbeddedValkey()
    server.start()
    pid = server.pid
    assert pid is not None
    try:
        with redis.Redis.from_url(server.url) as client:
            assert client.set("a", "b")
            assert client.get("a") == b"b"
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("appendonly") == {"appendonly": "no"}
    finally:
        server.stop()
    assert gone(pid)
    assert not server.alive()
    server.stop()  # again: nothing happens


def test_it_wants_its_password_and_hides_it() -> None:
    server = EmbeddedValkey()
    server.start()
    try:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        once = Retry(NoBackoff(), 0)
        with redis.Redis(port=port, retry=once) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        password = server.url.partition("//:")[2].partition("@")[0]
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.stop()


def test_after_a_crash_it_comes_back_at_the_same_address() -> None:
    server = EmbeddedValkey()
    server.start()
    try:
        url = server.url
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert until(lambda: not server.alive())
        server.start()
        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.ping()
    finally:
        server.stop()


def test_it_dies_with_a_parent_that_is_killed() -> None:
    program = (
        "import time\nfrom cluster.valkey import EmbeddedValkey\n"
        "server = EmbeddedValkey()\nserver.start()\nprint(server.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: gone(pid))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValkeyError, match=rf"did not start on 127.0.0.1:{port}: .*[Aa]ddress already in use"
        ):
            EmbeddedValkey(port=port).start()


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ValkeyError, match=r"can't listen on 192[.]0[.]2[.]77"):
        EmbeddedValkey(host="192.0.2.77").start()


def test_other_threads_are_refused() -> None:
    """The kernel would end the server with the thread."""
    caught: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedValkey().start()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_free_ports_can_be_bound() -> None:
    port = free_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        assert probe.getsockname()[1] == port
