"""One request inside the engine."""

from __future__ import annotations

import enum
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from workers.protocol.messages import FinishReason, TokenLogprobs, Work


class State(enum.Enum):
    """Where a request stands. Blocks are held in RESERVED, RUNNING, PREFILLED and LEAVING only."""

    WAITING = "waiting"  # wants to be scheduled; holds nothing
    RESERVED = "reserved"  # decode side: blocks wait for the bytes of a prefill worker
    RUNNING = "running"  # takes part in steps
    PREFILLED = "prefilled"  # prefill side: computed; lasts until the hand-over holds the blocks itself
    LEAVING = "leaving"  # over, or unwanted; lasts until no step in flight writes into its blocks
    FINISHED = "finished"


class Request:
    """Tokens, blocks and progress of one request.

    `num_tokens` is what is known, `num_computed_tokens` is what lies in the KV cache; a step lets the second catch
    up with the first. When it has caught up, one more token is sampled. What steps in flight will add to the two is
    counted apart: `token_ids` holds no token that nobody has seen.
    """

    def __init__(self, work: Work, *, prefill_only: bool = False) -> None:
        self.work = work
        self.request_id = work.request_id
        self.sampling = work.sampling
        self.prefill_only = prefill_only
        self.token_ids: list[int] = [*work.prompt, *work.output]
        self.num_prompt_tokens = len(work.prompt)
        self.num_given_tokens = len(
            self.token_ids
        )  # known on arrival: prompt and output of earlier placements
        self.num_computed_tokens = 0
        self.num_flying_steps = 0  # steps in flight that it is part of, at most two
        self.num_flying_tokens = 0  # behind num_computed_tokens, that they compute
        self.num_flying_samples = 0  # behind token_ids, that they sample
        self.num_found_tokens = 0  # while it waits: known tokens that the cache held when it began to
        self.num_cached_tokens = (
            0  # of the given tokens: found in the prefix cache here (or on the prefill worker)
        )
        self.block_table = array("i")  # only grows while it runs: steps copy it as it is
        self.block_hashes: list[bytes] = []  # of the full blocks of token_ids
        self.num_stored_blocks = 0  # blocks of the table that the prefix cache knows
        # Whether its next token hangs on which tokens came before, besides through the logits.
        sampling = work.sampling
        self.reads_history = bool(
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
        )
        self.state = State.WAITING
        self.preemptions = 0
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None
        self.sampler_memo: Any = None  # whatever the sampler has made of `sampling`, kept for the next step
        self.times = Times()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and output when the request runs to its limit."""
        return self.num_prompt_tokens + self.sampling.max_tokens

    def append(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Add an output token and see whether it ends the request."""
        self.token_ids.append(token)
        sampling = self.sampling
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        if num_output_tokens > sampling.min_tokens:
            is_eos = token in eos_token_ids and not sampling.ignore_eos
            if is_eos or token in sampling.stop_token_ids:
                self.finish_reason = "stop"
                self.stop_token = token
                return
        if num_output_tokens >= sampling.max_tokens:
            self.finish_reason = "length"

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.state.value}, {self.num_computed_tokens}/{self.num_tokens} computed, "
            f"{len(self.block_table)} blocks)"
        )


@dataclass(slots=True)
class Times:
    """Monotonic seconds; 0 where a stage has not been reached."""

    arrived: float = field(default_factory=time.monotonic)
    scheduled: float = 0.0  # first step that computed something of it
    prefilled: float = 0.0  # first token sampled here, or committed from the prefill worker
    last_token: float = 0.0

    def sampled(self, now: float) -> None:
        if not self.prefilled:
            self.prefilled = now
        self.last_token = now


@dataclass(slots=True, eq=False)
class NewToken:
    """A token that a step gave to a request. Not frozen: there is one for each stream and step, and that costs more."""

    request: Request
    index: int  # among the output tokens
    token: int
    logprobs: TokenLogprobs | None
