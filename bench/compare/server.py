"""A system while it is measured: started, waited for, warmed up, stopped by its process id. One lives at a time."""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench.compare.environments import PeerUnavailable, last_line
from bench.compare.systems import Launch
from bench.load import Target, client_for, closed_loop
from bench.prompts import Book

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 45
_ROOT = Path(__file__).resolve().parents[2]


def shown(launch: Launch) -> str:
    """The command as one would type it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in launch.env.items()), shlex.join(launch.command)])


@contextmanager
def running(launch: Launch, port: int, book: Book, log: Path) -> Iterator[tuple[Target, float]]:
    """The warm server and the seconds it took to start. Raises PeerUnavailable when it does not."""
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            launch.command,
            cwd=_ROOT,  # where `python -m bench...` is found by every environment's Python
            env=os.environ | dict(launch.env),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a process group of its own, so that it can be stopped whole
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url + launch.ready, log)
        started_s = time.perf_counter() - began
        model = launch.model or httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        target = Target(url, model, launch.fields)
        asyncio.run(_warm(target, book, log))
        yield target, started_s
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerUnavailable(f"ended with {process.returncode} while it started: {last_line(log)}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.1)
    raise PeerUnavailable(f"not ready after {START_TIMEOUT_S} s: {last_line(log)}")


async def _warm(target: Target, book: Book, log: Path) -> None:
    """One request, then as many at once as the workloads send: compiles, allocates and pages in what it will use."""
    rng = random.Random("warm")
    async with client_for(target, 16) as client:
        for count, prompt_tokens in ((1, 128), (16, 192), (1, 1024)):
            prompts = [book.passage(prompt_tokens, rng) for _ in range(count)]
            timed, _ = await closed_loop(client, target, prompts, 16, count)
            if failed := next((t.error for t in timed if t.error), ""):
                raise PeerUnavailable(f"a first request failed: {failed[:300]} (log: {last_line(log)})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind in its own group
    except ProcessLookupError:
        pass
    process.wait()
