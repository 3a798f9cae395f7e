"""The load generator against servers that count for themselves, and its figures against ones made by hand."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from bench.completions_app import Answer, completions_app
from bench.serve.__main__ import arguments, main
from bench.serve.arrivals import KINDS, Arrivals
from bench.serve.drive import Run, closed_loop, open_loop
from bench.serve.figures import figures, in_flight
from bench.serve.prompts import Part, PromptMaker
from bench.serve.report import progress_line, table
from bench.serve.server import Record, Server, ServerError, find_out, first_model
from bench.serve.wire import Events, Wire
from bench.serve.work import Range, Session, Synthetic, Turn, replayed, until
from cluster.planner.slo import Slo
from cluster.planner.trace import Trace, TraceRequest
from workers.models.random_model import write_random_model

IDS = PromptMaker("ids", seed=0, vocab_size=200)


class Slow:
    """Writes after `pause_s`; remembers prompts and how many it had at a time."""

    pause_s = 0.0

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.running = self.most = 0

    def submit(self, prompt: list[int], answer: Answer) -> None:
        self.prompts.append(prompt)
        asyncio.get_running_loop().create_task(self._write(len(self.prompts), answer))

    async def _write(self, number: int, answer: Answer) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.pause_s)
        for _ in range(answer.max_tokens):
            answer.put([65 + number % 8])
        self.running -= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def url(model: Path, slow: Slow) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(completions_app(slow, model, "m"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


@asynccontextmanager
async def server_at(url: str, **settings: Any) -> AsyncIterator[Server]:
    wire = Wire(url)
    yield Server(wire, "m", "completions", **({"timeout_s": 20.0} | settings))
    wire.close()


def single(due_s: float, tokens: int = 8, output: int = 3, key: object = None) -> Session:
    return Session(due_s, (Turn((Part(key or due_s, tokens),), output),))


def started() -> Run:
    return Run(time.perf_counter())


# --- when requests come --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_keep_their_rate_and_repeat_with_their_seed(kind: Any) -> None:
    arrivals = Arrivals(kind, rate=8.0, cv=3.0, on_s=2.0, off_s=6.0)
    times = list(islice(arrivals.times(random.Random(1)), 20_000))
    assert times == sorted(times)
    assert times == list(islice(arrivals.times(random.Random(1)), 20_000))
    assert len(times) / times[-1] == pytest.approx(8.0, rel=0.06)
    gaps = [b - a for a, b in pairwise(times)]
    cv = statistics.stdev(gaps) / statistics.fmean(gaps)
    expected = {"constant": 0.0, "poisson": 1.0, "gamma": 3.0}.get(kind)
    if expected is None:
        assert all(at % 8.0 < 2.0 for at in times)  # only in the on-phases
    else:
        assert cv == pytest.approx(expected, rel=0.08, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.0, "cv": 0.0}, {"rate": 1.0, "on_s": -1.0}])
def test_impossible_arrivals_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Arrivals("gamma", **wrong)


# --- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids", "text"])
def test_blocks_that_a_trace_shares_are_shared_by_the_prompts(form: Any) -> None:
    trace = Trace(
        (
            TraceRequest(0.0, 20, 5, (1, 2, 3)),
            TraceRequest(1.0, 19, 5, (1, 2, 4)),
            TraceRequest(2.0, 12, 5, (9, 2)),
        ),
        block_tokens=8,
    )
    maker = PromptMaker(form, seed=0, vocab_size=200)
    prompts = []
    for session in replayed(trace):
        joined = maker.join([maker.piece(part) for part in session.turns[0].parts])
        prompts.append(joined.split() if isinstance(joined, str) else joined)
    assert [len(prompt) for prompt in prompts] == [20, 19, 12]
    assert prompts[0][:16] == prompts[1][:16]
    assert prompts[0][16:19] != prompts[1][16:19]
    assert prompts[2][:8] != prompts[0][:8]
    assert prompts[2][8:12] == prompts[0][8:12]  # the same block's first four


def test_a_long_request_of_a_trace_is_cut_to_what_the_model_holds() -> None:
    [session] = replayed(Trace((TraceRequest(0.0, 900, 300, (1, 2)),), block_tokens=512), max_tokens=400)
    assert session.turns[0].output_tokens == 200
    assert session.turns[0].num_tokens == 200


def test_a_trace_without_blocks_gives_prompts_of_their_own() -> None:
    sessions = list(replayed(Trace((TraceRequest(0.0, 9, 1), TraceRequest(0.0, 9, 1)))))
    assert IDS.piece(sessions[0].turns[0].parts[0]) != IDS.piece(sessions[1].turns[0].parts[0])


def test_synthetic_sessions() -> None:
    synthetic = Synthetic(
        shared_tokens=32,
        shared_kinds=2,
        own_tokens=Range(4, 9),
        output_tokens=Range(2, 2),
        turns=3,
        think_s=1.0,
    )
    sessions = list(islice(synthetic.sessions(random.Random(0), (0.0 for _ in range(200))), 200))
    assert {session.turns[0].parts[0].key for session in sessions} == {("shared", 0), ("shared", 1)}
    assert {session.turns[0].num_tokens for session in sessions} == {32 + n for n in range(4, 10)}
    assert all(session.turns[0].think_s == 0 for session in sessions)
    thinks = [turn.think_s for session in sessions for turn in session.turns[1:]]
    assert statistics.fmean(thinks) == pytest.approx(1.0, rel=0.15)
    assert len(list(until(sessions, requests=10))) == 4  # of three turns each


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        (["--rate", "0"], "not above 0"),
        (["--rate", "1", "--concurrency", "2"], "give one of them"),
        (["--slo", "ttfb=1"], "ttft=SECONDS"),
        (["--prompt-tokens", "9:3"], "LOW at most HIGH"),
        (["--trace", "x", "--rate", "2"], "--speedup"),
        (["--requests", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            arguments(given)
        assert told in capsys.readouterr().err


# --- loops ----------------------------------------------------------------------------------------------------------


async def test_an_open_loop_is_not_slowed_by_slow_answers(url: str, slow: Slow) -> None:
    slow.pause_s = 1.0
    run = started()
    async with server_at(url) as server:
        await open_loop(server, IDS, [single(0.01 * n) for n in range(40)], run)
    assert slow.most == 40
    assert not any(record.error for record in run.records)
    assert all(record.ttft >= 1.0 for record in run.records)
    assert run.most_in_flight == 40


async def test_waiting_for_the_generator_counts_as_latency(url: str, slow: Slow) -> None:
    """Coordinated omission: what is sent late was due before."""
    run = started()

    async def stall() -> None:
        await asyncio.sleep(0.05)
        time.sleep(0.6)  # noqa: ASYNC251 - the generator is held up

    async with server_at(url) as server:
        held = asyncio.create_task(stall())
        await open_loop(server, IDS, [single(0.02 * n) for n in range(20)], run)
        await held
    delayed = [record for record in run.records if record.late > 0.2]
    assert len(delayed) >= 5
    assert all(record.ttft > record.late for record in delayed)
    late = figures(run, None, 0.0)["late_s"]
    assert late["max"] == max(record.late for record in run.records)


async def test_a_closed_loop_has_so_many_at_a_time(url: str, slow: Slow) -> None:
    slow.pause_s = 0.01
    run = started()
    async with server_at(url) as server:
        await closed_loop(server, IDS, [single(0.0, key=n) for n in range(30)], run, users=4)
        assert server.wire.opened == 4  # connections are kept
    assert slow.most == 4
    assert len(run.records) == 30
    assert [record.tokens for record in run.records] == [3] * 30


async def test_sessions_send_their_history_and_think(url: str, slow: Slow) -> None:
    turns = (
        Turn((Part("a", 10),), 4),
        Turn((Part("b", 5),), 4, think_s=0.3),
        Turn((Part("c", 5),), 4, think_s=0.0),
    )
    run = started()
    async with server_at(url) as server:
        await open_loop(server, IDS, [Session(0.0, turns)], run)
    first, second, third = slow.prompts
    said = [IDS.join([IDS.piece(part) for part in turn.parts]) for turn in turns]
    assert first == said[0]
    assert second == [*first, *[66] * 4, *said[1]]
    assert third == [*second, *[67] * 4, *said[2]]
    assert [record.asked_prompt_tokens for record in run.records] == [10, 19, 28]
    assert run.records[1].started == pytest.approx(run.records[0].ended + 0.3)


async def test_text_is_made_as_long_as_token_ids_where_ids_are_not_taken(url: str, slow: Slow) -> None:
    async with server_at(url) as server:
        asked, maker = await find_out(server, "text", None, seed=0)
        run = started()
        await open_loop(asked, maker, [single(0.0, tokens=500)], run)
    assert maker.form == "text"
    assert len(slow.prompts[-1]) == pytest.approx(500, rel=0.15)  # bytes are this model's tokens


async def test_the_vocabulary_is_found_by_asking() -> None:
    refused: list[int] = []

    async def answer(body: Any) -> tuple[int, bytes]:
        largest = max(body["prompt"])
        if largest >= 1000 or "ignore_eos" not in body:
            refused.append(largest)
            return 400, b'{"error": {"message": "outside the vocabulary"}}'
        return 200, sse({"choices": [{"text": "x"}]}, {"choices": [], "usage": usage(8, 1)})

    async with scripted(answer) as url, server_at(url) as server:
        _, maker = await find_out(server, None, None, seed=0)
    assert maker.form == "ids"
    assert refused == [31_999, 7_999]
    assert max(maker.join([maker.piece(Part("x", 5000))])) < 1000


async def test_fields_beyond_openais_are_left_out_where_they_are_refused() -> None:
    async def answer(body: Any) -> tuple[int, bytes]:
        if "ignore_eos" in body:
            return 400, b'{"error": {"message": "unknown field ignore_eos"}}'
        words = len(body["messages"][0]["content"].split()) * 2 + 11  # two tokens a word and a template
        return 200, sse(
            {"choices": [{"delta": {"content": "hi"}}]}, {"choices": [], "usage": usage(words, 1)}
        )

    async with scripted(answer) as url:
        server = Server(Wire(url), "m", "chat", 5.0)
        asked, maker = await find_out(server, None, None, seed=0)
        asked.wire.close()
    assert "ignore_eos" not in asked.fields
    assert len(maker.join([maker.piece(Part("x", 100))]).split()) == 50


# --- what goes wrong ------------------------------------------------------------------------------------------------


def sse(*events: Any, end: bool = True) -> bytes:
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return data + (b"data: [DONE]\n\n" if end else b"")


def usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output}


@asynccontextmanager
async def scripted(answer: Callable[[Any], Any]) -> AsyncIterator[str]:
    """A server of one answer a connection: (status, body), or None to close without one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        given = await answer(json.loads(await reader.readexactly(length) or b"null"))
        if given is not None:
            status, body = given
            lines = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(lines.encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def test_errors_are_told_apart() -> None:
    token = {"choices": [{"text": "x"}]}
    answers: dict[int, tuple[int, bytes] | None] = {
        1: (429, b'{"error": {"message": "too much"}}'),
        2: None,
        3: (200, sse(token, end=False)),
        4: (200, sse({"error": {"message": "the writer failed"}})),
        5: (200, sse({"choices": [], "usage": usage(5, 0)})),
        6: (200, b"data: {no json\n\n"),
        7: (200, sse(token, token, {"choices": [], "usage": usage(7, 2)})),
    }

    async def answer(body: Any) -> tuple[int, bytes] | None:
        if len(body["prompt"]) == 8:
            await asyncio.sleep(2)
        return answers.get(len(body["prompt"]))

    run = started()
    async with scripted(answer) as url, server_at(url, timeout_s=0.5) as server:
        await open_loop(server, IDS, [single(0.0, tokens=n, output=3) for n in range(1, 9)], run)
        await asyncio.sleep(0)
    async with server_at("http://127.0.0.1:9") as nowhere:
        await open_loop(nowhere, IDS, [single(0.0)], run)
    found = figures(run, Slo.parse("ttft=10"), 0.0)
    assert found["errors_by_kind"] == {
        "http 429": 1,
        "disconnected": 1,
        "truncated": 1,
        "stream": 1,
        "empty": 1,
        "protocol": 1,
        "timeout": 1,
        "connect": 1,
    }
    assert "too much" in run.records[0].error
    assert found["ended_early"] == 1
    assert found["goodput_share"] == pytest.approx(1 / 9)


async def test_a_server_without_models_is_told_of() -> None:
    wire = Wire("http://127.0.0.1:9")
    with pytest.raises(ServerError, match="does not list its models"):
        await first_model(wire)
    with pytest.raises(ValueError, match="ftp://x"):
        Wire("ftp://x")


def test_events_come_out_whole_however_they_are_cut() -> None:
    stream = b'data: {"a": 1}\n\ndata: {"b": 2}\r\n\r\n: comment\n\ndata: [DONE]\n\n'
    for size in (1, 3, 7, 100):
        events = Events()
        found = [event for i in range(0, len(stream), size) for event in events.feed(stream[i : i + size])]
        assert found == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


# --- figures --------------------------------------------------------------------------------------------------------


def made_by_hand() -> Run:
    """Three requests, a second apart; the second keeps no limit, the third fails."""
    run = Run(100.0)
    run.records = [
        Record(
            100.0, [100.5, 100.6, 100.7], 3, 10, ended=100.7, sent=100.1, written=100.3, asked_output_tokens=3
        ),
        Record(101.0, [103.0, 104.0], 2, 20, ended=104.0, sent=101.0, asked_output_tokens=2),
        Record(102.0, [], 0, None, ended=102.5, sent=102.0, error="no", kind="http 500"),
    ]
    run.ended, run.cpu_s = 104.0, 0.4
    return run


def test_figures_are_what_one_works_out_by_hand() -> None:
    found = figures(made_by_hand(), Slo.parse("ttft=1,tpot=0.2"), 0.0)
    assert found["seconds"] == pytest.approx(4.0)
    assert (found["requests"], found["errors"], found["output_tokens"], found["prompt_tokens"]) == (
        3,
        1,
        5,
        30,
    )
    assert found["ttft_s"]["mean"] == pytest.approx(1.25)
    assert found["ttft_s"]["p99"] == pytest.approx(2.0)
    assert found["tpot_s"]["mean"] == pytest.approx((0.1 + 1.0) / 2)
    assert found["itl_s"]["max"] == pytest.approx(1.0)
    assert found["e2e_s"]["max"] == pytest.approx(3.0)
    assert found["late_s"]["max"] == pytest.approx(0.1)
    assert found["connect_s"]["max"] == pytest.approx(0.2)
    assert found["goodput_requests_per_s"] == pytest.approx(0.25)
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["offered_requests_per_s"] == pytest.approx(1.0)
    assert found["generator"]["cpu_share"] == pytest.approx(0.1)


def test_the_warm_up_is_left_out() -> None:
    found = figures(made_by_hand(), None, 0.5)
    assert (found["requests"], found["warmup_requests"], found["errors"]) == (2, 1, 1)
    assert found["ttft_s"]["mean"] == pytest.approx(2.0)


def test_in_flight_over_time() -> None:
    curve = in_flight(made_by_hand().records, 100.0)
    at = dict(zip(curve["at_s"], curve["requests"], strict=True))
    assert [at[t] for t in (0.0, 0.5, 0.8, 1.5, 2.2, 3.0, 4.0)] == [1, 1, 0, 1, 2, 1, 0]


def test_a_table_warns_of_a_generator_that_measures_itself() -> None:
    run = made_by_hand()
    run.cpu_s = 3.9
    text = table({"what": "x", "loop": "open", "run": figures(run, None, 0.0)})
    assert "the generator was at 98% of its core" in text
    assert "sent 100 ms late" in text
    assert "errors (1 http 500)" in text
    assert "errors 1" in progress_line(run, 104.0)


def test_the_command_writes_what_it_found(url: str, slow: Slow, tmp_path: Path) -> None:
    options = ["--url", url, "--vocab-size", "200", "--rate", "200", "--requests", "20", "--every-request"]
    options += [
        "--prompt-tokens",
        "16:32",
        "--output-tokens",
        "4",
        "--slo",
        "ttft=20",
        "--out",
        str(tmp_path),
    ]
    main(options)
    found = json.loads((tmp_path / "serve.json").read_text())
    assert found["run"]["requests"] == len(found["requests"]) == 20
    assert found["run"]["goodput_share"] == 1.0
    assert found["server"]["prompts"] == "ids"
    lengths = sorted(request["prompt_tokens"] for request in found["requests"])
    assert lengths == sorted(map(len, slow.prompts[1:]))  # without the one that asked what is taken
    assert "TTFT" in (tmp_path / "serve.md").read_text()


def test_the_command_says_why_it_can_not(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not list its models"):
        main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="can't be read"):
        main(["--trace", str(tmp_path / "none"), "--url", "http://127.0.0.1:9", "--model", "m"])
