"""The load generator and every workload against a server that counts for itself."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from bench.completions_app import Answer, completions_app
from bench.load import Target, Timed, ask, client_for, closed_loop, result_of
from bench.prompts import Book, library_text
from bench.workloads import QUICK, WORKLOADS
from router.chat.tokenizer import TextTokenizer
from workers.models.random_model import write_random_model


class Counter:
    """Writes 1, 2, 3, ... two tokens at a time; fails for prompts of `poison` tokens."""

    poison = 7

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.running = self.most = 0

    def submit(self, prompt: list[int], answer: Answer) -> None:
        self.prompts.append(len(prompt))
        asyncio.get_running_loop().create_task(self._write(len(prompt), answer))

    async def _write(self, given: int, answer: Answer) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        if given == self.poison:
            answer.put(None)
        for first in range(0, answer.max_tokens, 2):
            await asyncio.sleep(0)
            answer.put([65, 66][: answer.max_tokens - first])
        self.running -= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def target(model: Path, counter: Counter) -> Iterator[Target]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = completions_app(counter, model, "m")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Target(f"http://127.0.0.1:{listener.getsockname()[1]}", "m")
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def book(model: Path) -> Book:
    return Book(TextTokenizer(model), library_text()[:20_000])


async def test_tokens_are_counted_and_the_concurrency_is_kept(target: Target, counter: Counter) -> None:
    async with client_for(target, 3) as client:
        timed, seconds = await closed_loop(client, target, ["a b c"] * 9, 11, 3)
    result = result_of(timed, seconds)
    assert (result.requests, result.errors, result.output_tokens) == (9, 0, 99)
    assert result.prompt_tokens == sum(counter.prompts)
    assert counter.most <= 3
    assert [len(t.arrivals) for t in timed] == [6] * 9  # pairs of tokens, the last alone


async def test_failures_are_counted_and_named(target: Target) -> None:
    async with client_for(target, 2) as client:
        timed, seconds = await closed_loop(client, target, [[65] * 7, [65] * 8], 4, 2)
        gone = await ask(client, Target(target.url, "m", {"prompt": None}), "x", 4)
    result = result_of(timed, seconds)
    assert (result.requests, result.errors, result.output_tokens) == (2, 1, 4)
    assert "the writer failed" in result.first_error
    assert gone.error


async def test_a_server_that_is_not_there_is_an_error_of_its_request() -> None:
    nowhere = Target("http://127.0.0.1:9", "m")
    async with client_for(nowhere, 1) as client:
        assert "ConnectError" in (await ask(client, nowhere, "x", 4)).error


def test_too_few_tokens_are_an_error_and_nothing_good_raises() -> None:
    with pytest.raises(RuntimeError, match="every request failed: gone"):
        result_of([Timed(0.0, error="gone")], 1.0)


def test_times_of_one_request() -> None:
    timed = Timed(started=1.0, arrivals=[2.0, 2.5, 4.0], tokens=5)
    assert timed.ttft == 1.0
    assert timed.tpot == 0.5
    assert timed.gaps == [0.5, 1.5]


@pytest.mark.parametrize("name", WORKLOADS)
async def test_every_workload_gives_every_figure_of_its_table(name: str, target: Target, book: Book) -> None:
    figures = await WORKLOADS[name].drive(target, book, 0, QUICK)
    assert figures["errors"] == 0
    assert figures["requests"] > 0
    assert {*WORKLOADS[name].columns, WORKLOADS[name].headline} <= figures.keys()


async def test_sessions_resend_what_was_said(target: Target, book: Book, counter: Counter) -> None:
    await WORKLOADS["sessions"].drive(target, book, 0, QUICK)
    assert sorted(counter.prompts) == [384] * QUICK.sessions + [384 + 64 + 64] * QUICK.sessions
