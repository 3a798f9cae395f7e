"""`headrace serve`: one cluster in the foreground, from its first line to its last process."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from cluster.address import Address
from cluster.config import ClusterConfig
from cluster.launch import Cluster, Stopped
from cluster.logs import set_up_logging
from cluster.parts import LaunchError, Parts
from cluster.ports import PortError
from cluster.progress import Steps
from cluster.ray_runtime import TEMP_PREFIX, RayError
from cluster.runfile import AlreadyRunning, Run, RunFile
from cluster.session import Session
from cluster.terminal import taken_over
from cluster.topology import TopologyError
from cluster.valkey import ValkeyError

logger = logging.getLogger(__name__)

_FORCED = 130


class ServeError(Exception):
    """`headrace serve` ends here; the message says why, for people."""


class Foreground:
    """Everything that `serve` holds, so that a signal can let go of it."""

    def __init__(self, config: ClusterConfig, parts: Parts | None = None) -> None:
        self._config = config
        self._console = Console(file=sys.stderr, highlight=False)
        self._answers = Console(
            file=sys.stdout, highlight=False
        )  # what a script may want to read goes to stdout
        self._cluster = Cluster(config, parts)
        self._run_file: RunFile | None = None
        self._session: Session | None = None

    def serve(self) -> None:
        """Returns after an orderly stop. Raises ServeError."""
        with taken_over(self._console):
            set_up_logging(self._config.log_level)
            before = {number: signal.signal(number, self._on_signal) for number in _signals()}
            try:
                self._take_name()
                self._run()
            except (
                LaunchError,
                TopologyError,
                PortError,
                ValkeyError,
                RayError,
                AlreadyRunning,
                OSError,
            ) as error:
                raise ServeError(str(error)) from error
            except Stopped:
                pass
            finally:
                self._stop()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _run(self) -> None:
        with Steps(self._console) as steps:
            address = self._cluster.start(steps)
        self._note(address)
        self._announce(address)
        self._cluster.tend()

    def _take_name(self) -> None:
        self._run_file = RunFile(self._config.cluster)
        left_over = self._run_file.left_over
        if left_over is not None:
            remove_temp_dirs(left_over)
        self._note(None)
        if (files := self._cluster.ray.make_files()) is not None:
            self._session = Session(files)

    def _note(self, address: Address | None) -> None:
        assert self._run_file is not None
        files = self._cluster.ray.make_files()
        self._run_file.write(
            Run(
                cluster=self._config.cluster,
                pid=os.getpid(),
                url=address.url if address else "",
                grpc=address.grpc if address else "",
                model=address.model if address else "",
                temp_dirs=[str(files)] if files else [],
            )
        )

    def _announce(self, address: Address) -> None:
        say = self._answers.print
        say(f"[bold]{address.model}[/bold] is served", soft_wrap=True)
        say(f"  HTTP  {address.url}/v1", soft_wrap=True)
        if address.grpc:
            say(f"  gRPC  {address.grpc}", soft_wrap=True)
        say("  try it:\n", soft_wrap=True)
        say(curl_line(address, self._config.router.wants_keys), markup=False, soft_wrap=True)
        say("\n  Ctrl-C stops everything.", soft_wrap=True)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._cluster.stopping.is_set():
            self._force()
        self._cluster.stopping.set()
        self._console.print(f"{signal.Signals(number).name}: stopping (once more to force it)", style="dim")
        if self._cluster.interruptible:
            raise Stopped

    def _stop(self) -> None:
        self._cluster.stopping.set()  # from here on a signal means force
        for trouble in self._cluster.stop():
            logger.warning("while stopping: %s", trouble)
        self._end_session()
        if self._run_file is not None:
            self._run_file.remove()
            self._console.print("stopped", style="dim")

    def _end_session(self) -> None:
        if self._session is not None:
            if left := self._session.kill_processes():
                logger.debug("killed %d processes that had not ended by themselves", left)
            self._session.close()
        self._cluster.ray.remove_files()

    def _force(self) -> NoReturn:
        self._end_session()
        if self._run_file is not None:
            self._run_file.remove()
        os._exit(_FORCED)


def _signals() -> tuple[signal.Signals, ...]:
    """Those that stop us. Under nohup a terminal that goes away is no reason to."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


def curl_line(address: Address, with_key: bool) -> str:
    """A request to paste into a shell."""
    body = f'{{"model": "{address.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "Authorization: Bearer $HEADRACE_API_KEY"' if with_key else ""
    url = shlex.quote(f"{address.url}/v1/chat/completions")
    return f"curl {url}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def remove_temp_dirs(run: Run) -> list[str]:
    """Remove what a killed process left behind. Only directories of our own making, whatever the file says."""
    removed: list[str] = []
    for name in run.temp_dirs:
        path = Path(name)
        ours = path.name.startswith(TEMP_PREFIX) and path.parent in (
            Path(tempfile.gettempdir()),
            Path("/tmp"),
        )
        if ours and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            removed.append(name)
    return removed
