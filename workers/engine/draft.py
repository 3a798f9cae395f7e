"""Guesses from a smaller model with the same vocabulary.

It draws each guess with the request's own sampling at the position's own noise, so it guesses what the large model
would draw as far as their distributions agree, at any temperature.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine.block_pool import BlockPool
from workers.engine.plan import NOT_A_NUMBER, Sampled
from workers.engine.request import Request, State
from workers.engine.sampler import SampleInput
from workers.engine.step_input import StepBuilder, StepInput


class StepRunner(Protocol):
    def run(self, step: StepInput) -> list[Sampled]: ...


@dataclass(slots=True)
class _Sequence:
    """What the draft model's KV cache holds of a request."""

    block_table: array[int] = field(default_factory=lambda: array("i"))
    num_computed: int = 0  # leading tokens of the request
    guesses: list[int] = field(default_factory=list)  # computed behind them; some may turn out right

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Right guesses count as computed. At least the last token is left, to sample from."""
        for guess in self.guesses:
            if self.num_computed >= len(token_ids) - 1 or token_ids[self.num_computed] != guess:
                break
            self.num_computed += 1
        self.guesses = []


class DraftProposer:
    """Keeps a KV cache beside the engine's: a request's blocks are held while it runs."""

    is_free = False

    def __init__(
        self,
        runner: StepRunner,
        *,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        max_step_tokens: int,
    ) -> None:
        """`max_step_tokens`: of one step of the draft model; longer prompts take several steps of the engine."""
        self._runner = runner
        self._block_size = block_size
        self._pool = BlockPool(num_blocks, caching=False)
        self._max_model_len = max_model_len
        self._max_step_tokens = max_step_tokens
        self._sequences: dict[Request, _Sequence] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        self._release_ended()
        guesses: dict[Request, list[int]] = {}
        limits = {request: most for request, most in wanted if most > 0 and self._hold(request, most)}
        asked = self._read(list(limits), guesses)
        for place in range(1, max((limits[request] for request in asked), default=0)):
            asked = [r for r in asked if limits[r] > place and guesses[r][-1] != NOT_A_NUMBER]
            if not asked:
                break
            builder, samples = StepBuilder(self._block_size), []
            for request in asked:
                sequence, guess = self._sequences[request], guesses[request]
                builder.add(guess[-1:], request.num_tokens + place - 1, sequence.block_table, 1)
                samples.append(SampleInput(request, request.num_output_tokens + place, tuple(guess)))
                sequence.guesses.append(guess[-1])
            self._run(builder, samples, guesses)
        return [[t for t in guesses.get(request, ()) if t != NOT_A_NUMBER] for request, _ in wanted]

    def _read(self, requests: Sequence[Request], guesses: dict[Request, list[int]]) -> list[Request]:
        """Compute known tokens that are new here, as many as a step takes; who is up to date gets its first guess."""
        budget = self._max_step_tokens
        builder, samples = StepBuilder(self._block_size), []
        for request in requests:
            sequence = self._sequences[request]
            sequence.catch_up(request.token_ids)
            start = sequence.num_computed
            tokens = request.token_ids[start : start + budget]
            if not tokens:
                continue
            budget -= len(tokens)
            sequence.num_computed += len(tokens)
            complete = sequence.num_computed == request.num_tokens
            builder.add(tokens, start, sequence.block_table, int(complete))
            if complete:
                samples.append(SampleInput(request, request.num_output_tokens))
        if budget < self._max_step_tokens:
            self._run(builder, samples, guesses)
        return [sample.request for sample in samples]

    def _run(
        self, builder: StepBuilder, samples: list[SampleInput], guesses: dict[Request, list[int]]
    ) -> None:
        sampled = self._runner.run(StepInput(builder.arrays(), samples))
        for sample, choice in zip(samples, sampled, strict=True):
            guesses.setdefault(sample.request, []).append(choice.token)

    def _hold(self, request: Request, most: int) -> bool:
        """Blocks for the known tokens and the guesses; False without room."""
        num_tokens = request.num_tokens + most
        if num_tokens > self._max_model_len:
            return False
        sequence = self._sequences.setdefault(request, _Sequence())
        missing = -(-num_tokens // self._block_size) - len(sequence.block_table)
        fresh = self._pool.allocate(missing) if missing > 0 else []
        if fresh is None:
            return False
        sequence.block_table.extend(fresh)
        return True

    def _release_ended(self) -> None:
        for request in [r for r in self._sequences if r.state is not State.RUNNING]:
            self._pool.release(self._sequences.pop(request).block_table)
