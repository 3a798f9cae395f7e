"""What one step needs, handed to the runner whole."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.cpu.decoder import StepArrays
from workers.engine.plan import Plan
from workers.engine.sampler import SampleInput


@dataclass(frozen=True, slots=True)
class StepInput:
    """S sequences with T tokens in all, of which R rows are sampled."""

    arrays: StepArrays
    samples: list[SampleInput]  # [R] beside arrays.rows
    # (index into arrays.token_ids, index into the samples of the step submitted before this one): tokens that the host
    # does not know yet, whatever the array says. A runner takes them from that step, a void one (a NaN) as token 0.
    carried: Sequence[tuple[int, int]] = ()

    @staticmethod
    def of(plan: Plan, block_size: int) -> StepInput:
        builder = StepBuilder(block_size)
        samples: list[SampleInput] = []
        for item in plan.items:
            request, draft = item.request, item.draft
            end = item.start + item.count
            tokens = request.token_ids[item.start : end]
            if draft:
                tokens += draft
            builder.add(tokens, item.start, request.block_table, item.num_samples)
            if item.samples:
                position = end - request.num_prompt_tokens
                samples.append(SampleInput(request, position))
                for guessed in range(1, len(draft) + 1):
                    samples.append(SampleInput(request, position + guessed, draft[:guessed]))
        return StepInput(builder.arrays(), samples)


class StepBuilder:
    """Collects sequences in arrays of machine integers, which become a step's arrays without a copy."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._token_ids, self._positions = array("i"), array("i")
        self._slots = array("q")
        self._query_start, self._lengths = array("i", (0,)), array("i")
        self._blocks, self._block_start = array("i"), array("i")
        self._rows = array("i")

    def add(self, token_ids: Sequence[int], start: int, table: array[int], num_samples: int) -> None:
        """Tokens of a sequence from position `start` on, its context in the blocks of `table`; the last ones sample."""
        block_size = self._block_size
        end = start + len(token_ids)
        self._token_ids.extend(token_ids)
        if end == start + 1:
            self._positions.append(start)
            self._slots.append(table[start // block_size] * block_size + start % block_size)
        else:
            self._positions.extend(range(start, end))
            self._slots.extend(
                [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
            )
        num_tokens = len(self._token_ids)
        self._query_start.append(num_tokens)
        self._lengths.append(end)
        self._block_start.append(len(self._blocks))
        self._blocks.extend(
            table
        )  # also what is held for later tokens: a copy of memory, whatever its length
        self._rows.extend(range(num_tokens - num_samples, num_tokens))

    def arrays(self) -> StepArrays:
        return StepArrays(
            token_ids=np.frombuffer(self._token_ids, np.int32),
            positions=np.frombuffer(self._positions, np.int32),
            slots=np.frombuffer(self._slots, np.int64),
            query_start=np.frombuffer(self._query_start, np.int32),
            lengths=np.frombuffer(self._lengths, np.int32),
            blocks=np.frombuffer(self._blocks, np.int32),
            block_start=np.frombuffer(self._block_start, np.int32),
            rows=np.frombuffer(self._rows, np.int32) if self._rows else np.empty(0, np.int32),
        )
