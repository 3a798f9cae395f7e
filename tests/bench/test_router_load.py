"""The load generator of `headrace bench router`: what it counts, however the bytes arrive, and the time in tokens."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.router.clock_tokens import NUM_TOKENS, RANGE_S, TICK_US, age_s, tick
from bench.router.load import HttpLoad, _Client

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = [b'data: {"choices":[{"delta":{"content":" w%d"}}]}\n\n' % n for n in range(5)]
STREAM = HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS) + b"0\r\n\r\n"


class Wire:
    """Stands for a transport."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.asked.append(data)

    def abort(self) -> None:
        self.aborted = True


def client(streams: bool) -> tuple[HttpLoad, _Client, Wire]:
    load, wire = HttpLoad([b"one", b"two"], {}, streams), Wire()
    protocol = _Client(load)
    transport: Any = wire
    protocol.connection_made(transport)
    return load, protocol, wire


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=20))
@settings(deadline=None)
def test_events_are_counted_however_they_arrive(cuts: list[int]) -> None:
    load, protocol, wire = client(streams=True)
    for _ in range(2):  # the second answer on the same connection
        places = sorted({0, *cuts, len(STREAM)})
        # The first bytes of an answer come whole: a status line that is cut would be taken for a failure.
        places = [place for place in places if place == 0 or place >= len(HEAD)]
        for start, end in itertools.pairwise(places):
            protocol.data_received(STREAM[start:end])
    assert (load.counts.events, load.counts.answers) == (2 * len(EVENTS), 2)
    assert wire.asked == [b"one", b"two", b"one"]
    assert not load.counts.failures


def test_whole_answers_are_known_by_their_length() -> None:
    load, protocol, wire = client(streams=False)
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789"
    protocol.data_received(answer[:-4])
    assert load.counts.answers == 0
    protocol.data_received(answer[-4:])
    assert load.counts.answers == 1
    assert len(load.counts.latencies_s) == 1
    assert wire.asked == [b"one", b"two"]


def test_an_error_is_a_failure_and_ends_the_connection() -> None:
    load, protocol, wire = client(streams=True)
    protocol.data_received(b"HTTP/1.1 429 Too Many Requests\r\n\r\n")
    assert load.counts.failures == [b"HTTP/1.1 429 Too Many Requests\r\n\r\n"]
    assert wire.aborted


@given(st.floats(0, 1e6), st.floats(0, RANGE_S * 0.99))
def test_a_token_tells_how_old_it_is(sent_at: float, later_s: float) -> None:
    sent, now = tick(lambda: sent_at), tick(lambda: sent_at + later_s)
    assert 0 <= sent < NUM_TOKENS
    assert abs(age_s(sent, now) - later_s) <= 2 * TICK_US / 1e6


def test_the_age_of_a_token_is_read_from_what_arrives() -> None:
    load = HttpLoad([b""], {b'" w4"': tick()}, True)
    load._look(STREAM)
    (age,) = load.counts.ages_s
    assert 0 <= age < RANGE_S
    load._look(b"nothing to see")
    assert len(load.counts.ages_s) == 1
