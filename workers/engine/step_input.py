"""What one step needs, handed to the runner whole."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.cpu.decoder import StepArrays
from workers.engine.plan import Plan
from workers.engine.request import Request
from workers.engine.sampler import SampleInput

_UNKNOWN = (0,)  # stands where the runner puts a token that only the device knows


@dataclass(frozen=True, slots=True)
class StepInput:
    """S sequences with T tokens in all, of which R rows are sampled."""

    arrays: StepArrays
    samples: list[SampleInput]  # [R] beside arrays.rows; none on tensor-parallel ranks that follow another
    # (index into arrays.token_ids, index into the samples of the step submitted before this one): tokens that the host
    # does not know yet, whatever the array says. A runner takes them from that step, a void one (a NaN) as token 0.
    carried: Sequence[tuple[int, int]] = ()

    @staticmethod
    def of(plan: Plan, block_size: int, before: StepInput | None = None) -> StepInput:
        """`before`: the step that was submitted before this one, where that still runs."""
        builder = StepBuilder(block_size)
        samples: list[SampleInput] = []
        rows: dict[Request, int] = {}
        carried: list[tuple[int, int]] = []
        for item in plan.items:
            request, start, draft = item.request, item.start, item.draft
            end = start + item.count
            if item.carried:
                assert before is not None, "nobody samples the token"
                rows = rows or {sample.request: row for row, sample in enumerate(before.samples)}
                carried.append((builder.num_tokens, rows[request]))
                builder.add(_UNKNOWN, start, request.block_table, 1)
            else:
                tokens = request.token_ids[start:end]
                if draft:
                    tokens += draft
                builder.add(tokens, start, request.block_table, item.num_samples)
            if item.samples:
                position = end - request.num_prompt_tokens
                samples.append(SampleInput(request, position))
                for guessed in range(1, len(draft) + 1):
                    samples.append(SampleInput(request, position + guessed, draft[:guessed]))
        return StepInput(builder.arrays(), samples, carried)


class StepBuilder:
    """Collects sequences in arrays of machine integers, which become a step's arrays."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._token_ids, self._blocks = array("i"), array("i")
        self._starts, self._counts, self._block_start = array("i"), array("i"), array("i")
        self._num_samples = array("i")

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def add(self, token_ids: Sequence[int], start: int, table: array[int], num_samples: int) -> None:
        """Tokens of a sequence from position `start` on, its context in the blocks of `table`; the last ones sample."""
        self._token_ids.extend(token_ids)
        self._starts.append(start)
        self._counts.append(len(token_ids))
        self._num_samples.append(num_samples)
        self._block_start.append(len(self._blocks))
        # Also what is held for later tokens: a copy of memory, whatever its length.
        self._blocks.extend(table)

    def arrays(self) -> StepArrays:
        starts, counts = np.frombuffer(self._starts, np.int32), np.frombuffer(self._counts, np.int32)
        blocks, block_start = (
            np.frombuffer(self._blocks, np.int32),
            np.frombuffer(self._block_start, np.int32),
        )
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        sequence = np.repeat(np.arange(len(counts)), counts)  # of each token
        place = np.arange(self.num_tokens, dtype=np.int32)
        positions = place + (starts - query_start[:-1])[sequence]
        block, within = np.divmod(positions, self._block_size)
        slots = blocks[block_start[sequence] + block] * np.int64(self._block_size) + within
        first_row = query_start[1:] - np.frombuffer(self._num_samples, np.int32)
        return StepArrays(
            token_ids=np.frombuffer(self._token_ids, np.int32),
            positions=positions,
            slots=slots,
            query_start=query_start,
            lengths=starts + counts,
            blocks=blocks,
            block_start=block_start,
            rows=place[place >= first_row[sequence]],
        )
