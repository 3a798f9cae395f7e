"""What of a request outlives the workers under it: prompt, tokens so far, and what it has learned on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from router.generation import Generation, TokenChunk
from workers.protocol.hashes import extend_hashes
from workers.protocol.messages import FinishReason, TokenDelta, Work, WorkerInfo


@dataclass(slots=True)
class Request:
    generation: Generation
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None  # of the first placement that told
    failures: int = 0  # placements lost, `busy` not counted
    placements: int = 0  # placements that a worker had taken
    excluded: dict[str, float] = field(default_factory=dict)  # worker -> until then, monotonic seconds
    avoided: dict[str, float] = field(default_factory=dict)  # the same, but better than nobody
    hash_root: bytes = b""  # of the model it started on, it never goes on with another; empty: none known yet
    block_size: int = 0
    token_bytes: int = 0  # of one token's KV on the wire
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output: what has to be in the KV cache before the next token can be sampled."""
        return len(self.generation.prompt) + len(self.output)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold all of it and the next token. 1 before a model is known."""
        return self.num_tokens // self.block_size + 1 if self.block_size else 1

    def begin(self, reference: WorkerInfo) -> None:
        """Fix the model, once."""
        if not self.hash_root:
            self.hash_root = reference.hash_root
            self.block_size = reference.layout.block_size
            self.token_bytes = reference.layout.block_bytes // self.block_size

    def hashes(self) -> list[bytes]:
        """Of the full blocks of prompt + output; extended as tokens come."""
        tokens = self.generation.prompt + self.output if self.output else self.generation.prompt
        extend_hashes(self._hashes, tokens, self.block_size, self.hash_root, self.generation.cache_salt)
        return self._hashes

    def work(self, wire_id: str) -> Work:
        return Work(
            request_id=wire_id,
            prompt=self.generation.prompt,
            sampling=self.generation.sampling,
            output=list(self.output),
            cache_salt=self.generation.cache_salt,
            priority=self.generation.priority,
        )

    def accept(self, delta: TokenDelta) -> TokenChunk | None:
        """Append what is new of a delta that follows the output or overlaps it. None: it repeats what is known."""
        known = len(self.output) - delta.index
        if known < 0:
            raise ValueError(f"delta starts at token {delta.index}, but only {len(self.output)} are known")
        tokens = delta.tokens[known:] if known else delta.tokens
        if not tokens and (delta.finish_reason is None or known > len(delta.tokens)):
            return None
        self.output.extend(tokens)
        self.finish_reason = delta.finish_reason
        if self.cached_tokens is None:
            self.cached_tokens = delta.cached_tokens
        logprobs = delta.logprobs[known:] if known else delta.logprobs
        return TokenChunk(tokens, logprobs, delta.finish_reason, delta.stop_token, self.cached_tokens)

    # --- who is to be left alone for a while ------------------------------------------------------------------------

    def exclude(self, worker_id: str, until: float) -> None:
        self.excluded[worker_id] = until

    def avoid(self, worker_id: str, until: float) -> None:
        self.avoided[worker_id] = until

    def excluded_now(self, now: float) -> set[str]:
        self.excluded = {worker: until for worker, until in self.excluded.items() if until > now}
        return set(self.excluded)

    def avoided_now(self, now: float) -> set[str]:
        self.avoided = {worker: until for worker, until in self.avoided.items() if until > now}
        return set(self.avoided)

    def excluded_for_s(self, workers: Iterable[str], now: float) -> float:
        """Seconds until the first of these excluded workers may be tried again."""
        return max(min(self.excluded[worker] for worker in workers) - now, 0.0)
