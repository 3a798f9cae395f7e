"""The answer of /v1/chat/completions: one JSON object, or a stream of chunks."""

from __future__ import annotations

from typing import Any

import msgspec

from router.chat.answer import Piece
from router.http.collected import Collected
from router.http.logprobs import chat_logprobs_json
from router.http.plan import Plan

_encode = msgspec.json.Encoder().encode


class ChatFormat:
    """What does not change from chunk to chunk is encoded once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        start = _encode(self._envelope("chat.completion.chunk"))[
            :-2
        ]  # without the end of `choices` and the object
        self._heads = [b'data: %b{"index":%d,"delta":' % (start, index) for index in range(plan.num_choices)]
        self._close = b"]" + (b',"usage":null' if plan.include_usage else b"") + b"}\n\n"
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._close
        self._detailed = plan.wants_logprobs or plan.return_token_ids

    def opening(self, choice: int) -> bytes:
        delta = b'{"role":"assistant","content":""}'
        if not self._plan.return_token_ids:
            return self._heads[choice] + delta + self._tail
        prompt = b'],"prompt_token_ids":' + _encode(self._plan.prompts[0])
        return self._heads[choice] + delta + self._tail.replace(b"]", prompt, 1)

    def chunk(self, choice: int, piece: Piece) -> bytes:
        """May be empty: a token whose text is held back says nothing."""
        head = self._heads[choice]
        if self._detailed:
            return head + self._detailed_chunk(piece) + self._close + self._finish(head, piece)
        text = b'%b{"content":%b}%b' % (head, _encode(piece.text), self._tail) if piece.text else b""
        return text if piece.finish_reason is None else text + self._finish(head, piece)

    def usage(self, usage: dict[str, Any]) -> bytes:
        return b"data: " + _encode(self._envelope("chat.completion.chunk") | {"usage": usage}) + b"\n\n"

    def whole(self, collected: list[Collected], usage: dict[str, Any]) -> bytes:
        choices = [self._choice(index, choice) for index, choice in enumerate(collected)]
        answer = self._envelope("chat.completion") | {"choices": choices, "usage": usage}
        if self._plan.return_token_ids:
            answer["prompt_token_ids"] = self._plan.prompts[0]
        return _encode(answer)

    def _envelope(self, kind: str) -> dict[str, Any]:
        plan = self._plan
        return {
            "id": plan.request_id,
            "object": kind,
            "created": plan.created,
            "model": plan.model.name,
            "choices": [],
        }

    def _choice(self, index: int, collected: Collected) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": collected.text, "refusal": None},
            "logprobs": chat_logprobs_json(collected.logprobs) if self._plan.wants_logprobs else None,
            "finish_reason": collected.finish_reason,
            "stop_reason": collected.stop_reason,
        }
        if self._plan.return_token_ids:
            choice["token_ids"] = collected.token_ids
        return choice

    def _detailed_chunk(self, piece: Piece) -> bytes:
        logprobs = chat_logprobs_json(piece.logprobs) if self._plan.wants_logprobs else None
        ids = b',"token_ids":' + _encode(piece.token_ids) if self._plan.return_token_ids else b""
        return b'{"content":%b},"logprobs":%b,"finish_reason":null%b}' % (
            _encode(piece.text),
            _encode(logprobs),
            ids,
        )

    def _finish(self, head: bytes, piece: Piece) -> bytes:
        if piece.finish_reason is None:
            return b""
        return b'%b{},"logprobs":null,"finish_reason":"%b","stop_reason":%b}%b' % (
            head,
            piece.finish_reason.encode(),
            _encode(piece.stop_reason),
            self._close,
        )
