"""What is asked of the cluster: one request of a trace, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace.

    `hashes` are the names of the full blocks of prompt *and* output, in order: the first `prompt_tokens // block_size`
    are what a router can know. `after` is the number of the request whose end this one waits for (the turn of a
    session before it); `at_s` then counts from there, else from the start of the trace.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: Sequence[bytes]
    after: int | None = None


class Job:
    """One request on its way. Seconds are simulated ones; negative: it has not come so far."""

    __slots__ = (
        "arrived_s",
        "asked",
        "cached_tokens",
        "done",
        "ended_s",
        "excluded",
        "failures",
        "fetched_tokens",
        "first_token_s",
        "number",
        "oracle_tokens",
        "outcome",
        "placed_s",
        "placements",
        "preemptions",
        "prompt_hashes",
        "stalls",
        "worker",
    )

    def __init__(self, number: int, asked: Asked, block_size: int) -> None:
        self.number = number
        self.asked = asked
        self.prompt_hashes = list(asked.hashes[: asked.prompt_tokens // block_size])
        self.done = 0  # output tokens that the router has
        self.arrived_s = self.placed_s = self.first_token_s = self.ended_s = -1.0
        self.outcome = ""  # "finished", or why not
        self.cached_tokens = 0  # of the prompt: not computed by the first placement, fetched ones included
        self.fetched_tokens = 0  # of these: came from another worker
        self.oracle_tokens = 0  # what could have been had anywhere when it was routed first
        self.placements = 0
        self.failures = 0
        self.preemptions = 0
        self.stalls = 0
        self.excluded: dict[str, float] = {}  # worker -> until then
        self.worker = ""  # the decode worker, of the last placement

    @property
    def known_tokens(self) -> int:
        return self.asked.prompt_tokens + self.done

    def hashes(self, block_size: int) -> Sequence[bytes]:
        """Of the full blocks of prompt and output so far."""
        if not self.done:
            return self.prompt_hashes
        return self.asked.hashes[: self.known_tokens // block_size]

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Between two tokens, on the average; 0 for a single one."""
        more = self.asked.output_tokens - 1
        return (self.ended_s - self.first_token_s) / more if more > 0 else 0.0

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.arrived_s
