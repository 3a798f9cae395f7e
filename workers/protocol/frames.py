"""Frames and the handshake: the one wire codec of Headrace.

A frame is a u32 length (little-endian) and that many bytes of msgpack. The length is checked before a byte of the
body is read. Both ends prove that they hold the cluster's secret with HMAC-SHA256 over the other's nonce; the secret
itself never travels, and proofs are compared in constant time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec

from workers.protocol.messages import (
    PROTOCOL_VERSION,
    Challenge,
    FromWorker,
    Hello,
    KvToReceiver,
    KvToSender,
    Refused,
    ToWorker,
    Welcome,
    WorkerInfo,
)

MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_GREETING_BYTES = 64 * 1024  # of a frame of the handshake: the peer is not known yet
NONCE_BYTES = 32
_IOV_MAX = 512  # buffers of one system call; the kernel takes 1024

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


class ProtocolError(Exception):
    """The peer sent something that this protocol does not allow. The connection is closed."""


class Codec(Generic[M]):
    """Decodes the messages one side of a conversation may send."""

    def __init__(self, message_type: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)

    def decode(self, body: bytes | bytearray | memoryview) -> M:
        try:
            return self._decoder.decode(body)
        except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"undecodable frame of {len(body)} bytes: {error}") from error


to_worker: Codec[ToWorker] = Codec(ToWorker)
from_worker: Codec[FromWorker] = Codec(FromWorker)
kv_to_receiver: Codec[KvToReceiver] = Codec(KvToReceiver)
kv_to_sender: Codec[KvToSender] = Codec(KvToSender)


def encode(message: Any) -> bytes:
    """The whole frame, length included."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} has {len(body)} bytes, a frame holds {MAX_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(body)) + body


def _checked_length(header: bytes | bytearray | memoryview, max_bytes: int) -> int:
    length: int = _LENGTH.unpack(header)[0]
    if length > max_bytes:
        raise ProtocolError(f"frame of {length} bytes announced, at most {max_bytes} are allowed")
    return length


async def read_frame(reader: asyncio.StreamReader, codec: Codec[M], *, max_bytes: int = MAX_FRAME_BYTES) -> M:
    """Raises asyncio.IncompleteReadError at the end of the stream, ProtocolError on a bad frame."""
    length = _checked_length(await reader.readexactly(_LENGTH.size), max_bytes)
    return codec.decode(await reader.readexactly(length))


def recv_exactly(sock: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fill `view`. Raises ConnectionError when the peer closes, TimeoutError after the socket's time-out.

    The time-out is for each piece; with a `deadline` (monotonic) the whole has to be here by then.
    """
    received = 0
    while received < len(view):
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            count = sock.recv_into(view[received:])
        except BlockingIOError as error:
            raise TimeoutError("the peer stalled inside a frame") from error
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        received += count


def block_in_kernel(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel wait, at most so long, where Python would poll: one call moves a whole piece then."""
    timeout = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    sock.settimeout(None)


def recv_views(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Fill `views` one after another, many with one call. Raises as `recv_exactly`."""
    pending = deque(view for view in views if len(view))
    while pending:
        try:
            count = sock.recvmsg_into(list(islice(pending, _IOV_MAX)), 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise TimeoutError("the peer stalled inside a frame") from error
        if count == 0:
            raise ConnectionError("the peer closed the connection")
        while count:
            if count < len(pending[0]):
                pending[0] = pending[0][count:]
                break
            count -= len(pending.popleft())


def recv_frame(
    sock: socket.socket,
    codec: Codec[M],
    *,
    max_bytes: int = MAX_FRAME_BYTES,
    deadline: float | None = None,
) -> M:
    header = bytearray(_LENGTH.size)
    recv_exactly(sock, memoryview(header), deadline)
    body = bytearray(_checked_length(header, max_bytes))
    recv_exactly(sock, memoryview(body), deadline)
    return codec.decode(body)


def send_frame(sock: socket.socket, message: Any) -> None:
    sock.sendall(encode(message))


def send_views(sock: socket.socket, views: Iterable[memoryview]) -> None:
    """Send `views` one after another, many with one call, without copying them."""
    pending = deque(views)
    while pending:
        try:
            sent = sock.sendmsg(list(islice(pending, _IOV_MAX)))
        except BlockingIOError as error:
            raise TimeoutError("the peer takes nothing") from error
        while sent:
            if sent < len(pending[0]):
                pending[0] = pending[0][sent:]
                break
            sent -= len(pending.popleft())


def send_frame_with_fds(sock: socket.socket, message: Any, fds: Sequence[int]) -> None:
    """Over a unix socket: descriptors travel beside the first byte."""
    frame = encode(message)
    sent = socket.send_fds(sock, [frame], list(fds)) if fds else 0
    if sent < len(frame):  # sending nothing, too, fails when the peer has already read it, refused and left
        sock.sendall(frame[sent:])


def recv_frame_with_fds(
    sock: socket.socket, codec: Codec[M], *, max_fds: int, max_bytes: int
) -> tuple[M, list[int]]:
    """One frame and the descriptors beside it, which are the caller's to close."""
    header, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, max_fds)
    try:
        if len(header) != _LENGTH.size:
            raise ConnectionError("the peer closed the connection")
        body = bytearray(_checked_length(header, max_bytes))
        recv_exactly(sock, memoryview(body))
        return codec.decode(body), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


# --- handshake -------------------------------------------------------------------------------------------------------


def _proof(secret: bytes, side: bytes, nonce: bytes) -> bytes:
    return hmac.new(secret, side + nonce, hashlib.sha256).digest()


def new_challenge() -> Challenge:
    return Challenge(version=PROTOCOL_VERSION, nonce=secrets.token_bytes(NONCE_BYTES))


def answer_challenge(secret: bytes, challenge: Any, peer_id: str) -> Hello:
    """What a client sends. Raises ProtocolError when the server is not one of ours or of another version."""
    if not isinstance(challenge, Challenge):
        raise ProtocolError(f"expected a challenge, got {type(challenge).__name__}")
    if challenge.version != PROTOCOL_VERSION:
        raise ProtocolError(f"the worker speaks protocol {challenge.version}, this side {PROTOCOL_VERSION}")
    if len(challenge.nonce) != NONCE_BYTES:
        raise ProtocolError("malformed challenge")
    return Hello(
        version=PROTOCOL_VERSION,
        peer_id=peer_id,
        proof=_proof(secret, b"client", challenge.nonce),
        nonce=secrets.token_bytes(NONCE_BYTES),
    )


def judge_hello(secret: bytes, challenge: Challenge, hello: Any, info: WorkerInfo) -> Welcome | Refused:
    """What a server answers. After `Refused` it closes the connection."""
    if not isinstance(hello, Hello):
        return Refused(reason=f"expected hello, got {type(hello).__name__}")
    if hello.version != PROTOCOL_VERSION:
        return Refused(reason=f"protocol {hello.version} is not spoken here, {PROTOCOL_VERSION} is")
    if len(hello.nonce) != NONCE_BYTES:
        return Refused(reason="malformed hello")
    if not hmac.compare_digest(hello.proof, _proof(secret, b"client", challenge.nonce)):
        return Refused(reason="wrong cluster secret")
    return Welcome(proof=_proof(secret, b"server", hello.nonce), info=info)


def check_welcome(secret: bytes, hello: Hello, answer: Any) -> WorkerInfo:
    """What a client makes of the server's answer. Raises ProtocolError when it was refused or can't be trusted."""
    if isinstance(answer, Refused):
        raise ProtocolError(f"refused by the worker: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"expected welcome, got {type(answer).__name__}")
    if not hmac.compare_digest(answer.proof, _proof(secret, b"server", hello.nonce)):
        raise ProtocolError("the worker does not hold the cluster's secret")
    return answer.info


def greet(sock: socket.socket, secret: bytes, peer_id: str, codec: Codec[Any]) -> WorkerInfo:
    """The client's whole handshake on a new connection; `codec` decodes what the server says.

    The server does not know the client yet and the client not the server: no frame of either is long. Raises OSError,
    ProtocolError; the socket is the caller's to close then.
    """
    hello = answer_challenge(secret, recv_frame(sock, codec, max_bytes=MAX_GREETING_BYTES), peer_id)
    send_frame(sock, hello)
    return check_welcome(secret, hello, recv_frame(sock, codec, max_bytes=MAX_GREETING_BYTES))
