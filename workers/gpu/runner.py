"""Steps on a torch device: inputs in persistent buffers, graphs where the step has the size of one, tokens that stay.

What a step asks of the device is queued, in this order: its inputs, the forward pass up to the best token of each row
(one graph, or one launch after another), sampling where somebody wants more than the best token, the way of the tokens to
the host, a mark. `wait` waits for the mark, and nothing else waits for anything. The next step may be queued before: the
tokens that it needs of this one are taken on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kernels import reference_step_inputs
from kernels.attention_step import AttentionStep
from kernels.cpu.decoder import StepArrays
from workers.device_memory import DevicePages
from workers.engine.pending import Pending, Ready
from workers.engine.plan import Sampled
from workers.engine.step_input import StepInput
from workers.gpu.buckets import Buckets, Shape
from workers.gpu.buffers import Outputs, StagedStep, StepBuffers
from workers.gpu.device import Device, Mark
from workers.gpu.graphs import Body, Captured, Graphs, captured_by
from workers.gpu.sampler import DeviceSampler, Results, choose_best
from workers.gpu.split import split
from workers.parallel.collectives import ALONE, Parallel
from workers.shared_memory import SharedPages

logger = logging.getLogger(__name__)

PlaceInputs = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], None]


class Model(Protocol):
    """workers.models.decoder.Decoder, or whatever computes in its place."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_cache: Tensor, step: AttentionStep, rows: Tensor
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class DeviceRunner:
    """`submit` is called by one thread, and by it alone."""

    def __init__(
        self,
        model: Model,
        kv_cache: Tensor,
        sampler: DeviceSampler,
        buffers: StepBuffers,
        outputs: Outputs,
        device: Device,
        *,
        kernels: str,
        weights: str,
        max_model_len: int,
        shared: SharedPages | DevicePages | None = None,
        overlaps: bool = False,
        parallel: Parallel = ALONE,
        place_inputs: PlaceInputs = reference_step_inputs.place_inputs,
    ) -> None:
        """`kernels`, `weights`: their names. `parallel`: of the ranks that compute the model together rank 0 alone samples,
        the others' steps come without samples."""
        self.device, self.kv_cache, self.shared = kv_cache.device, kv_cache, shared
        self.kernels, self.weights, self.overlaps = kernels, weights, overlaps
        self.captured: Captured | None = None
        self._model, self._sampler, self._buffers, self._queue = model, sampler, buffers, device
        self._max_model_len = max_model_len
        self._place_inputs, self._parallel = place_inputs, parallel
        self._buckets = Buckets([], [])
        self._logits, self._tokens = outputs.logits, outputs.tokens
        self._most_tokens = len(outputs.tokens)  # of a step that is run whole
        self._placed = False  # whether tokens carried to this step were put among its own

    @torch.inference_mode()
    def capture(self, graphs: Graphs, buckets: Buckets) -> Captured:
        """Steps of these shapes, and no others, run in graphs from here on. While no step runs."""

        def capture() -> dict[Shape, Body]:
            # The largest first: all graphs allocate from one pool, and only one runs at a time.
            found = {shape: graphs.capture(self._body(shape)) for shape in buckets.all}
            self._sampler.capture(graphs, self._logits, self._tokens, {shape.rows for shape in found})
            return found

        with self._queue.use():
            captured = captured_by(graphs, capture)
        self.captured, self._buckets = captured, buckets
        return captured

    def forget_graphs(self) -> None:
        self.captured, self._buckets = None, Buckets([], [])
        self._sampler.forget_graphs()

    def watch_next(self) -> None:
        return None

    def run(self, step: StepInput) -> list[Sampled]:
        return self.submit(step).wait()

    def run_launched(self, step: StepInput) -> list[Sampled]:
        """Without a graph, even where there is one."""
        return self._submit(step, None).wait()

    def submit(self, step: StepInput) -> Pending:
        """See workers.engine.backend.Runner. A step for which there is no memory is run in parts."""
        tokens, self._placed = len(step.arrays.token_ids), False
        shape = self._buckets.shape_for(tokens, len(step.arrays.lengths), len(step.arrays.rows))
        if shape is None and tokens > self._most_tokens:
            return self._submit_parts(step, self._most_tokens)
        try:
            return self._submit(step, shape)
        except torch.OutOfMemoryError as error:
            if tokens == 1 or not self._parallel.shard.whole:  # the other ranks would wait for ever
                raise
            half = tokens // 2
            if shape is None:  # a graph has its memory, and only sampling asked for more
                self._most_tokens = half
            self._complain(tokens, error)
        return self._submit_parts(step, half)

    # --- a step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _submit(self, step: StepInput, shape: Shape | None) -> _Queued:
        """`shape`: of its graph, if it has one."""
        rows = len(step.arrays.rows)
        with self._queue.use():
            if shape is None:
                logits = self._launch(step)
            else:
                self._buffers.send(step.arrays, step.carried, shape)
                assert self.captured is not None, "a shape is that of a graph"
                self.captured.graphs[shape]()
                self._placed = True
                logits = self._logits[:rows]
            results: Results = list
            if rows and step.samples:
                results = self._sampler(logits, self._tokens[:rows], step.samples)
            if rows:
                self._parallel.broadcast(self._tokens[:rows])
            return _Queued(self._queue.mark(), results)

    def _launch(self, step: StepInput) -> Tensor:
        """One launch after another, at the step's own sizes. Logits [R, vocab]."""
        arrays = step.arrays
        rows = len(arrays.rows)
        max_queries = int(np.diff(arrays.query_start).max())
        # A chunk that samples nothing still ends in a row.
        shape = Shape(len(arrays.token_ids), len(arrays.lengths), max(rows, 1), max_queries)
        self._buffers.send(arrays, step.carried, shape)
        staged, tables = self._buffers.staged(shape), self._buffers.tables[: shape.seqs]
        self._place(staged, tables)
        self._placed = True
        hidden = self._forward(staged, staged.attention(tables, int(arrays.lengths.max())))
        logits = self._model.logits(hidden)[:rows] if rows else self._logits[:0]
        choose_best(logits, self._tokens[:rows])
        return logits

    def _body(self, shape: Shape) -> Body:
        """What is captured of a step: everything between its inputs' arrival and the choice of the best tokens."""
        buffers, tables = self._buffers, self._buffers.tables[: shape.seqs]
        buffers.send(_NO_STEP, (), shape)  # a step of nothing, filled up: what is called before the capture
        staged = buffers.staged(shape)
        attention = staged.attention(tables, self._max_model_len)
        logits, tokens = self._logits[: shape.rows], self._tokens[: shape.rows]

        def body() -> None:
            self._place(staged, tables)
            logits.copy_(self._model.logits(self._forward(staged, attention)))
            choose_best(logits, tokens)

        return body

    def _place(self, staged: StagedStep, tables: Tensor) -> None:
        self._place_inputs(
            staged.token_ids,
            staged.carried,
            self._tokens,
            staged.blocks,
            staged.block_start,
            staged.lengths,
            tables,
            self._buffers.block_size,
        )

    def _forward(self, staged: StagedStep, attention: AttentionStep) -> Tensor:
        return self._model.forward(staged.token_ids, staged.positions, self.kv_cache, attention, staged.rows)

    # --- without memory ---------------------------------------------------------------------------------------------

    def _complain(self, tokens: int, error: torch.OutOfMemoryError) -> None:
        logger.warning(
            "no memory for a step of %d tokens: it is run in parts, and so are others that need as much; lower "
            "engine.max_num_batched_tokens or engine.gpu_memory_utilization: %s",
            tokens, error,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _submit_parts(self, step: StepInput, most: int) -> Pending:
        """Of at most so many tokens. One after another is waited for: this is the way out, not the way."""
        rest: StepArrays | None = self._with_carried(step)
        found: list[Sampled] = []
        while rest is not None:
            part, rest = rest, None
            if len(part.token_ids) > most:
                part, rest = split(part, most)
            samples = step.samples[len(found) : len(found) + len(part.rows)]
            found += self.submit(StepInput(part, samples)).wait()
        with self._queue.use():
            tokens = torch.tensor([one.token for one in found], dtype=torch.int64)
            self._tokens[: len(found)].copy_(tokens)
        return Ready(found)

    def _with_carried(self, step: StepInput) -> StepArrays:
        """The step's arrays with the tokens that the host did not know. Of a step that got further than its inputs they
        are no longer where the step before has left them."""
        arrays = step.arrays
        if not step.carried:
            return arrays
        token_ids = arrays.token_ids.copy()
        with self._queue.use():
            left = self._buffers.token_ids(len(token_ids)) if self._placed else self._tokens
            known = left.tolist()
        for token, sample in step.carried:
            token_ids[token] = known[token] if self._placed else max(known[sample], 0)
        return replace(arrays, token_ids=token_ids)


class _Queued:
    def __init__(self, mark: Mark, results: Results) -> None:
        self._mark, self._results = mark, results

    def wait(self) -> list[Sampled]:
        self._mark.wait()
        return self._results()


def _empty(dtype: Any) -> np.ndarray:
    return np.empty(0, dtype)


_NO_STEP = StepArrays(
    token_ids=_empty(np.int32),
    positions=_empty(np.int32),
    slots=_empty(np.int64),
    query_start=np.zeros(1, np.int32),
    lengths=_empty(np.int32),
    blocks=_empty(np.int32),
    block_start=_empty(np.int32),
    rows=_empty(np.int32),
)
