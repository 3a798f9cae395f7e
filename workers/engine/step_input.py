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

_UNKNOWN = 0  # stands where the runner puts a token that only the device knows


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
        items = plan.items
        token_ids: list[int] = []
        rows: list[int] = []
        samples: list[SampleInput] = []
        carried: list[tuple[int, int]] = []
        row_before: dict[Request, int] = {}
        for item in items:
            request, start, draft = item.request, item.start, item.draft
            end = start + item.count
            if item.carried:
                assert before is not None, "nobody samples the token"
                row_before = row_before or {sample[0]: row for row, sample in enumerate(before.samples)}
                carried.append((len(token_ids), row_before[request]))
                token_ids.append(_UNKNOWN)
            elif end - start == 1:
                token_ids.append(request.token_ids[start])
            else:
                token_ids += request.token_ids[start:end]
            if item.samples:
                position = end - request.num_prompt_tokens
                rows.append(len(token_ids) - 1)
                samples.append(SampleInput(request, position))
                for guessed, token in enumerate(draft, start=1):
                    rows.append(len(token_ids))
                    token_ids.append(token)
                    samples.append(SampleInput(request, position + guessed, draft[:guessed]))
        arrays = step_arrays(
            token_ids,
            [item.start for item in items],
            [item.count + len(item.draft) for item in items],
            [item.request.block_table for item in items],
            rows,
            block_size,
        )
        return StepInput(arrays, samples, carried)


def step_arrays(
    token_ids: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    tables: Sequence[array[int]],
    rows: Sequence[int],
    block_size: int,
) -> StepArrays:
    """`starts`, `counts`, `tables`: of each sequence the position of its first token, how many of the tokens are its own,
    and its blocks, those held for later tokens too. `rows`: of token_ids, those that are sampled."""
    first, count = np.array(starts, np.int32), np.array(counts, np.int32)
    query_start, block_start = _starts(count), _starts([len(table) for table in tables])
    blocks = np.frombuffer(b"".join(tables), np.int32)
    if len(token_ids) == len(starts):
        positions, first_block = first, block_start[:-1]
    else:
        sequence = np.repeat(np.arange(len(starts)), count)  # of each token
        positions = (first - query_start[:-1])[sequence] + np.arange(len(token_ids), dtype=np.int32)
        first_block = block_start[sequence]
    nth, within = np.divmod(positions, np.int32(block_size))
    return StepArrays(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        slots=blocks[first_block + nth].astype(np.int64) * block_size + within,
        query_start=query_start,
        lengths=first + count,
        blocks=blocks,
        block_start=block_start[:-1],
        rows=np.array(rows, np.int32),
    )


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of so many things begins when they follow each other, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


class StepBuilder:
    """Collects the sequences of a step one by one."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._token_ids: list[int] = []
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._tables: list[array[int]] = []
        self._rows: list[int] = []

    def add(self, token_ids: Sequence[int], start: int, table: array[int], num_samples: int) -> None:
        """Tokens of a sequence from position `start` on, its context in the blocks of `table`; the last ones sample."""
        self._token_ids += token_ids
        self._starts.append(start)
        self._counts.append(len(token_ids))
        self._tables.append(table)
        self._rows += range(len(self._token_ids) - num_samples, len(self._token_ids))

    def arrays(self) -> StepArrays:
        return step_arrays(
            self._token_ids, self._starts, self._counts, self._tables, self._rows, self._block_size
        )
