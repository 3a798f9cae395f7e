"""Runners that overlap steps, without a device: each step runs when it is waited for, as late as can be."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.engine.pending import Ready
from workers.engine.plan import Sampled
from workers.engine.step_input import StepInput


class Late:
    """Any runner, with its steps put off: what they write and sample is there at the last moment."""

    overlaps = True

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._queue: deque[_Waiting] = deque()
        self._last: list[Sampled] = []  # of the step that ran last
        self.refuse: list[Exception] = []  # raised instead of taking the steps to come
        self.delay_s = 0.0  # before a step runs
        self.most_waiting = 0
        self.num_carried = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def submit(self, step: StepInput) -> _Waiting:
        assert len(self._queue) < 2, "two steps at most"
        if self.refuse:
            raise self.refuse.pop()
        tables = {s.request: s.request.block_table.tobytes() for s in step.samples}
        waiting = _Waiting(self, step, tables)
        self._queue.append(waiting)
        self.most_waiting = max(self.most_waiting, len(self._queue))
        self.num_carried += len(step.carried)
        return waiting

    def run(self, step: StepInput) -> list[Sampled]:
        return self.submit(step).wait()

    def finish(self, waiting: _Waiting) -> list[Sampled]:
        assert self._queue.popleft() is waiting, "steps are waited for in their order"
        step, arrays = waiting.step, waiting.step.arrays
        if step.carried:
            token_ids = arrays.token_ids.copy()
            for place, row in step.carried:  # of a step that failed: anything, nobody wants what comes of it
                token_ids[place] = max(self._last[row].token, 0) if self._last else 0
            step = dataclasses.replace(step, arrays=dataclasses.replace(arrays, token_ids=token_ids))
        for request, table in waiting.tables.items():
            assert request.block_table.tobytes().startswith(table), (
                "a step writes into blocks that were given back"
            )
        time.sleep(self.delay_s)
        self._last = []
        self._last = self._runner.run(step)
        return self._last


@dataclass(eq=False)
class _Waiting:
    runner: Late
    step: StepInput
    tables: dict[Any, bytes]

    def wait(self) -> list[Sampled]:
        return self.runner.finish(self)


NextToken = Callable[
    [list[int], list[int]], int
]  # (tokens in the cache, tokens that penalties count) -> token


class Memory:
    """A model that reads its context from the blocks of its cache, where a token stands for its keys and values."""

    overlaps = False
    kernels = weights = "none"
    shared = None

    def __init__(self, num_blocks: int, block_size: int, next_token: NextToken) -> None:
        self.cells = np.full((num_blocks, block_size), -1, np.int64)
        self._next_token = next_token
        self.fail: list[Exception] = []  # raised by the steps to come
        self.num_steps = 0

    def watch_next(self) -> None:
        return None

    def write(self, table: Sequence[int], token_ids: Sequence[int], first: int = 0) -> None:
        """What a transfer does: the tokens from block `first` of the table on."""
        size = self.cells.shape[1]
        for position in range(first * size, len(token_ids)):
            self.cells[table[position // size], position % size] = token_ids[position]

    def read(self, table: Sequence[int], length: int) -> list[int]:
        return self.cells[list(table)].reshape(-1)[:length].tolist()

    def submit(self, step: StepInput) -> Ready:
        return Ready(self.run(step))

    def run(self, step: StepInput) -> list[Sampled]:
        self.num_steps += 1
        arrays, size = step.arrays, self.cells.shape[1]
        self.cells.reshape(-1)[arrays.slots] = arrays.token_ids
        if self.fail:
            raise self.fail.pop()
        sampled = []
        for row, sample in zip(arrays.rows, step.samples, strict=True):
            sequence = int(np.searchsorted(arrays.query_start, row, side="right")) - 1
            position = int(arrays.positions[row])
            first = arrays.block_start[sequence]
            table = arrays.blocks[first : first + -(-int(arrays.lengths[sequence]) // size)]
            request = sample.request
            assert sample.position == position + 1 - request.num_prompt_tokens
            history = [*request.token_ids, *sample.draft] if request.reads_history else []
            sampled.append(Sampled(self._next_token(self.read(table, position + 1), history), None))
        return sampled
