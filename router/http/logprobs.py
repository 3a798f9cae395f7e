"""Token probabilities in OpenAI's two shapes."""

from __future__ import annotations

from typing import Any

from router.chat.answer import TokenText


def chat_logprobs_json(tokens: list[TokenText]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_entry(token.data, token.logprob),
                "top_logprobs": [_chat_entry(data, logprob) for data, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def completion_logprobs_json(tokens: list[TokenText], with_top: bool) -> dict[str, Any]:
    """The chosen token is always among the top ones, as OpenAI has it. Offsets count from the answer's start."""
    return {
        "tokens": [_completion_token(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens] if with_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _top(token: TokenText) -> dict[str, float]:
    top = {_completion_token(data): logprob for data, logprob in reversed(token.top)}
    top.setdefault(_completion_token(token.data), token.logprob)
    return top


def _completion_token(data: bytes) -> str:
    """Part of a character is written as OpenAI writes it, so that two such tokens have two names."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
