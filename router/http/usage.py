"""Token counts of an answer, in OpenAI's `usage`."""

from __future__ import annotations

from typing import Any

from router.chat.answer import Piece
from router.http.plan import Plan


class Usage:
    """Counts while pieces come. A prompt with several choices counts once, and so do its cached tokens."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # choice -> prompt tokens no worker had to compute

    @property
    def completion_tokens(self) -> int:
        return self._completion_tokens

    def add(self, choice: int, piece: Piece) -> None:
        self._completion_tokens += len(piece.token_ids)
        if piece.cached_tokens:
            self._cached[choice] = piece.cached_tokens

    def as_dict(self) -> dict[str, Any]:
        prompt_tokens = sum(map(len, self._plan.prompts))
        # Later choices find the first one's prompt in the cache: the first says what the request found.
        cached = sum(self._cached.get(index * self._plan.n, 0) for index in range(len(self._plan.prompts)))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
