"""The server under load: which model, how it wants its prompts, and one request to it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from bench.load import GREEDY, Timed
from bench.serve.prompts import Form, Part, Piece, PromptMaker
from bench.serve.wire import Events, Wire, WireError

Api = Literal["completions", "chat"]
_PATHS: Mapping[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# What every OpenAI-compatible server takes; without the rest answers may end early.
_PLAIN: Mapping[str, Any] = {"temperature": 0, "stream_options": {"include_usage": True}}
_VOCABULARIES = (32_000, 8_000, 1_000, 250)
_PROBE_WORDS = 200


class ServerError(Exception):
    """The server cannot be measured; the message says why."""


@dataclass
class Record(Timed):
    """One request. `started` is when it was due: what waiting for the generator cost counts as latency."""

    sent: float = 0.0  # when the generator came to it
    written: float = 0.0  # to the socket, once there was a connection; 0: never, or the answer broke off
    kind: str = ""  # of the error
    turn: int = 0
    asked_prompt_tokens: int = 0
    asked_output_tokens: int = 0

    @property
    def late(self) -> float:
        return self.sent - self.started

    def fail(self, kind: str, text: str) -> None:
        self.kind, self.error = kind, text[:500]


@dataclass(frozen=True)
class Said:
    """One side of one turn of a session."""

    role: Literal["user", "assistant"]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Server:
    wire: Wire
    model: str
    api: Api
    timeout_s: float
    fields: Mapping[str, Any] = field(default_factory=lambda: GREEDY)

    async def ask(self, said: Sequence[Said], maker: PromptMaker, record: Record) -> Record:
        """Fill `record` while the answer streams in. Whatever goes wrong is in the record."""
        body = msgspec.json.encode(self._body(said, maker, record.asked_output_tokens))
        events, plain = Events(), bytearray()
        over = False

        def came(data: bytes, now: float) -> None:
            nonlocal over
            if not data.startswith(b"data:") and not plain and not record.arrivals:
                if data.startswith(b"{"):
                    plain.extend(data)  # a refusal, not a stream
            elif plain:
                plain.extend(data)
            for event in events.feed(data):
                if event == b"[DONE]":
                    over = True
                elif event:
                    record.take(msgspec.json.decode(event), now)

        record.sent = time.perf_counter()
        try:
            status, record.written = await self.wire.request(
                "POST", _PATHS[self.api], body, came, self.timeout_s
            )
        except WireError as error:
            record.fail(error.kind, str(error))
        except msgspec.DecodeError as error:
            record.fail("protocol", f"an event is no JSON: {error}")
        else:
            if status != 200:
                record.fail(f"http {status}", plain.decode(errors="replace") or f"status {status}")
            elif record.error:
                record.kind = "stream"
            elif not over:
                record.fail("truncated", "the stream ended without [DONE]")
            elif not record.arrivals and not record.tokens:
                record.fail("empty", "the answer has no token")
        record.ended = time.perf_counter()
        if not record.error and not record.arrivals:
            record.arrivals.append(record.ended)  # all its text was held back to the end
        return record

    def _body(self, said: Sequence[Said], maker: PromptMaker, output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": output_tokens, "stream": True}
        if self.api == "completions":
            body["prompt"] = maker.join([piece for one in said for piece in one.pieces])
        else:
            body["messages"] = [{"role": one.role, "content": maker.join(one.pieces)} for one in said]
        return body | dict(self.fields)


async def first_model(wire: Wire) -> str:
    """Raises ServerError."""
    try:
        listed = await wire.get("/v1/models")
        return str(listed["data"][0]["id"])  # type: ignore[index]
    except WireError as error:
        raise ServerError(f"the server does not list its models: {error}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError("/v1/models lists no model; name one with --model") from error


async def find_out(
    server: Server, form: Form | None, vocab_size: int | None, seed: int
) -> tuple[Server, PromptMaker]:
    """What the server takes, by asking: token ids or text, its vocabulary, fields beyond OpenAI's.

    Raises ServerError when it answers nothing that was tried.
    """
    if server.api == "chat" and form == "ids":
        raise ServerError("--prompts ids: chat takes text only")
    refusals: list[str] = []
    for fields in (server.fields, _PLAIN):
        asked = replace(server, fields=fields)
        if form != "text" and server.api == "completions":
            for size in (vocab_size,) if vocab_size else _VOCABULARIES:
                maker = PromptMaker("ids", seed=seed, vocab_size=size)
                record = await _probe(asked, maker, [[size - 1, *range(size - 8, size - 1)]])
                if not record.error and record.prompt_tokens in (None, 8):
                    return asked, maker
                refusals.append(record.error or f"8 token ids were read as {record.prompt_tokens} tokens")
                if record.kind in ("connect", "timeout"):
                    raise ServerError(record.error)
        if form != "ids":
            maker = PromptMaker("text", seed=seed)
            words = maker.piece(Part("probe", _PROBE_WORDS))
            short, long = await _probe(asked, maker, [" the"]), await _probe(asked, maker, [words])
            if not long.error and not short.error:
                ratio = 1.0
                if long.prompt_tokens and short.prompt_tokens and long.prompt_tokens > short.prompt_tokens:
                    # What a chat template adds is in both.
                    ratio = (_PROBE_WORDS - 1) / (long.prompt_tokens - short.prompt_tokens)
                return asked, PromptMaker("text", seed=seed, words_per_token=ratio)
            refusals.append(long.error or short.error)
    raise ServerError(f"the server answers no request that was tried: {refusals[-1]}")


async def _probe(server: Server, maker: PromptMaker, pieces: list[Piece]) -> Record:
    record = Record(time.perf_counter(), asked_output_tokens=1)
    return await server.ask([Said("user", tuple(pieces))], maker, record)
