"""Frames and handshake, with msgpack's own library as the independent reader."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.transfer.pair import info
from workers.protocol.frames import (
    MAX_FRAME_BYTES,
    MAX_GREETING_BYTES,
    ProtocolError,
    answer_challenge,
    check_welcome,
    encode,
    from_worker,
    greet,
    judge_hello,
    new_challenge,
    read_frame,
    recv_frame,
    send_frame,
    to_worker,
)
from workers.protocol.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Challenge,
    Hello,
    Refused,
    Reserve,
    Sampling,
    TokenDelta,
    TokenLogprobs,
    Tokens,
    Welcome,
    Work,
    WorkerInfo,
)

SECRET = b"s" * 32
RESERVE = Reserve(
    work=Work(
        "r1", [1, 2, 3], Sampling(max_tokens=5, seed=7, logit_bias={4: -1.5}, stop_token_ids=(2,)), [9]
    ),
    transfer_id="t",
    lease_s=10.0,
    local_prefill_max=64,
)


def test_another_msgpack_reads_our_frames() -> None:
    frame = encode(RESERVE)
    assert struct.unpack("<I", frame[:4])[0] == len(frame) - 4
    body = msgpack.unpackb(frame[4:], strict_map_key=False)
    assert body["type"] == "rsv"
    assert body["work"]["prompt"] == [1, 2, 3]
    assert body["work"]["sampling"] == {
        "max_tokens": 5,
        "seed": 7,
        "logit_bias": {4: -1.5},
        "stop_token_ids": [2],
    }


def test_we_read_frames_of_another_msgpack() -> None:
    body = msgpack.packb({"type": "cancel", "request_id": "x", "a_field_of_a_later_version": 1})
    assert to_worker.decode(body) == Cancel("x")


@given(
    st.lists(
        st.builds(
            TokenDelta,
            request_id=st.text(max_size=8),
            index=st.integers(0, 2**40),
            tokens=st.lists(st.integers(0, 2**31), max_size=3),
            logprobs=st.lists(
                st.builds(TokenLogprobs, logprob=st.floats(-50, 0), top=st.just([(1, -0.5)])), max_size=2
            ),
            finish_reason=st.sampled_from([None, "stop", "length"]),
        ),
        max_size=4,
    )
)
def test_round_trip(deltas: list[TokenDelta]) -> None:
    frame = encode(Tokens(deltas))
    assert from_worker.decode(frame[4:]) == Tokens(deltas)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"garbage",
        msgpack.packb({"type": "cancel"}),
        msgpack.packb({"type": "cancel", "request_id": 5}),
        msgpack.packb({"type": "nope", "request_id": "x"}),
        msgpack.packb({"type": "tok", "deltas": []}),  # a worker's message, sent to a worker
        msgpack.packb({"type": "rsv", "work": {"request_id": "r", "prompt": ["1"]}}),
        msgpack.packb([1, 2, 3]),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        to_worker.decode(body)


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_protocol_error(body: bytes) -> None:
    try:
        to_worker.decode(body)
    except ProtocolError:
        return
    assert msgpack.unpackb(body)["type"]


async def test_length_is_checked_before_the_body_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", MAX_FRAME_BYTES + 1))
    with pytest.raises(ProtocolError, match="at most"):
        await read_frame(reader, to_worker)
    ours, theirs = socket.socketpair()
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError, match="at most"):
        recv_frame(ours, to_worker)
    ours.close()
    theirs.close()


def test_a_frame_that_would_not_be_read_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="a frame holds"):
        encode(Cancel("x" * (MAX_FRAME_BYTES + 1)))


# --- handshake -------------------------------------------------------------------------------------------------------


def shake(client: bytes, server: bytes) -> Welcome | Refused:
    challenge = new_challenge()
    return judge_hello(server, challenge, answer_challenge(client, challenge, "r"), info("d0", 5))


def test_equal_secrets_shake_hands() -> None:
    challenge = new_challenge()
    hello = answer_challenge(SECRET, challenge, "r")
    assert SECRET not in encode(hello)
    welcome = judge_hello(SECRET, challenge, hello, info("d0", 5))
    assert check_welcome(SECRET, hello, welcome).epoch == 5


def test_other_secrets_do_not() -> None:
    assert shake(b"x" * 32, SECRET) == Refused("wrong cluster secret")
    challenge = new_challenge()
    hello = answer_challenge(SECRET, challenge, "r")
    impostor = Welcome(proof=b"\0" * 32, info=info("d0", 5))
    with pytest.raises(ProtocolError, match="does not hold"):
        check_welcome(SECRET, hello, impostor)


def test_a_proof_is_good_for_one_nonce_and_one_side() -> None:
    first, second = new_challenge(), new_challenge()
    hello = answer_challenge(SECRET, first, "r")
    assert isinstance(judge_hello(SECRET, second, hello, info("d0", 5)), Refused)
    reflected = Welcome(proof=hello.proof, info=info("d0", 5))
    with pytest.raises(ProtocolError):
        check_welcome(SECRET, Hello(PROTOCOL_VERSION, "r", hello.proof, first.nonce), reflected)


def test_versions_and_shapes() -> None:
    with pytest.raises(ProtocolError, match="speaks protocol 99"):
        answer_challenge(SECRET, Challenge(99, b"n" * 32), "r")
    with pytest.raises(ProtocolError, match="malformed"):
        answer_challenge(SECRET, Challenge(PROTOCOL_VERSION, b""), "r")
    with pytest.raises(ProtocolError, match="expected a challenge"):
        answer_challenge(SECRET, Cancel("x"), "r")
    challenge = new_challenge()
    assert "expected hello" in judge_hello(SECRET, challenge, Cancel("x"), info("d0", 5)).reason  # type: ignore[union-attr]
    assert "protocol 99" in judge_hello(SECRET, challenge, Hello(99, "", b"", b""), info("d0", 5)).reason  # type: ignore[union-attr]
    with pytest.raises(ProtocolError, match="refused by the worker: no"):
        check_welcome(SECRET, answer_challenge(SECRET, challenge, "r"), Refused("no"))


def greeted(server: bytes) -> tuple[WorkerInfo, str]:
    """What a client that holds SECRET makes of a server, and who the server takes it for."""
    ours, theirs = socket.socketpair()
    said: list[Any] = []

    def serve() -> None:
        challenge = new_challenge()
        send_frame(theirs, challenge)
        said.append(recv_frame(theirs, to_worker))
        send_frame(theirs, judge_hello(server, challenge, said[0], info("d0", 5)))

    thread = threading.Thread(target=serve)
    with ours, theirs:
        ours.settimeout(10)
        thread.start()
        try:
            found = greet(ours, SECRET, "r7", from_worker)
        finally:
            thread.join(10)
    return found, said[0].peer_id


def test_a_client_greets_in_one_call() -> None:
    assert greeted(SECRET) == (info("d0", 5), "r7")
    with pytest.raises(ProtocolError, match="refused by the worker: wrong cluster secret"):
        greeted(b"x" * 32)


def test_a_server_that_is_not_known_yet_sends_no_long_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", MAX_GREETING_BYTES + 1))
        with pytest.raises(ProtocolError, match="at most"):
            greet(ours, SECRET, "r", from_worker)
