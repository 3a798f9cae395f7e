"""The answer of /v1/completions: one JSON object, or a stream of chunks."""

from __future__ import annotations

from typing import Any

import msgspec

from router.chat.answer import Piece
from router.http.collected import Collected
from router.http.logprobs import completion_logprobs_json
from router.http.plan import Plan

_encode = msgspec.json.Encoder().encode


class CompletionFormat:
    """What does not change from chunk to chunk is encoded once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._start = _encode(self._envelope())[:-2]  # without the end of `choices` and of the object
        self._heads = [
            b'data: %b{"index":%d,"text":' % (self._start, index) for index in range(plan.num_choices)
        ]
        self._close = b"]" + (b',"usage":null' if plan.include_usage else b"") + b"}\n\n"
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._close
        self._detailed = plan.wants_logprobs or plan.return_token_ids

    def opening(self, choice: int) -> bytes:
        echo = self._echo(choice)
        if not self._plan.return_token_ids:
            return self._heads[choice] + _encode(echo) + self._tail if echo else b""
        entry = {"index": choice, "text": echo, "logprobs": None, "finish_reason": None}
        entry["prompt_token_ids"] = self._plan.prompts[choice // self._plan.n]
        return b"data: %b%b%b" % (self._start, _encode(entry), self._close)

    def chunk(self, choice: int, piece: Piece) -> bytes:
        """May be empty: a token whose text is held back says nothing."""
        if self._detailed or piece.finish_reason is not None:
            return self._detailed_chunk(choice, piece)
        return self._heads[choice] + _encode(piece.text) + self._tail if piece.text else b""

    def usage(self, usage: dict[str, Any]) -> bytes:
        return b"data: " + _encode(self._envelope() | {"usage": usage}) + b"\n\n"

    def whole(self, collected: list[Collected], usage: dict[str, Any]) -> bytes:
        choices = [self._choice(index, choice) for index, choice in enumerate(collected)]
        return _encode(self._envelope() | {"choices": choices, "usage": usage})

    def _envelope(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "id": plan.request_id,
            "object": "text_completion",
            "created": plan.created,
            "model": plan.model.name,
            "choices": [],
        }

    def _choice(self, index: int, collected: Collected) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": self._echo(index) + collected.text,
            "logprobs": self._logprobs(collected),
            "finish_reason": collected.finish_reason,
            "stop_reason": collected.stop_reason,
        }
        if self._plan.return_token_ids:
            choice["prompt_token_ids"] = self._plan.prompts[index // self._plan.n]
            choice["token_ids"] = collected.token_ids
        return choice

    def _detailed_chunk(self, choice: int, piece: Piece) -> bytes:
        entry = {
            "index": choice,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            entry["stop_reason"] = piece.stop_reason
        if self._plan.return_token_ids:
            entry["token_ids"] = piece.token_ids
        return b"data: %b%b%b" % (self._start, _encode(entry), self._close)

    def _logprobs(self, given: Piece | Collected) -> dict[str, Any] | None:
        if not self._plan.wants_logprobs:
            return None
        return completion_logprobs_json(given.logprobs, bool(self._plan.samplings[0].logprobs))

    def _echo(self, choice: int) -> str:
        return self._plan.echo[choice // self._plan.n] if self._plan.echo else ""
