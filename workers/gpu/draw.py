"""The draw of all rows: Triton's kernels, which leave everything on the device, or one row after another in torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling import noise_key
from workers.engine.sampler import SampleInput, drawn
from workers.gpu.device import Device
from workers.gpu.graphs import Body, Graphs
from workers.gpu.memo import Memo


class Draw(Protocol):
    def capture(self, graphs: Graphs, logits: Tensor, tokens: Tensor, sizes: Collection[int]) -> None:
        """Calls for up to so many of the first rows of these very buffers run in graphs from here on."""

    def forget_graphs(self) -> None: ...

    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        """logits float32 [R, vocab], bias and penalties applied -> tokens int64 [R], whose negative ones stay."""


class TorchDraw:
    """Waits for the device."""

    def capture(self, graphs: Graphs, logits: Tensor, tokens: Tensor, sizes: Collection[int]) -> None:
        """Cannot be."""

    def forget_graphs(self) -> None:
        """There are none."""

    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        found = tokens.tolist()
        for row, (given, memo) in enumerate(zip(inputs, memos, strict=True)):
            if found[row] < 0 or memo.plain:
                continue
            found[row] = drawn(logits[row], given)
        tokens.copy_(tokens.new_tensor(found))


class TritonDraw:
    def __init__(self, device: Device) -> None:
        """Raises ImportError where Triton is not installed."""
        from kernels.triton import sampling
        from kernels.triton.sampling_cut import Filters

        self._sampling, self._filters = sampling, Filters
        self._device = device
        self._memos: list[Memo] = []
        self._params = _NO_PARAMS
        self._captured_at = 0  # address of the logits
        self._graphs: dict[int, tuple[Tensor, Body]] = {}  # by rows: where their parameters lie, and the draw

    def capture(self, graphs: Graphs, logits: Tensor, tokens: Tensor, sizes: Collection[int]) -> None:
        self.forget_graphs()
        self._captured_at = logits.data_ptr()
        for size in sorted(sizes):
            place = torch.zeros(size * _PARAMS.itemsize, dtype=torch.uint8, device=logits.device)
            body = partial(self._draw, logits[:size], tokens[:size], place, True)
            self._graphs[size] = place, graphs.capture(body)

    def forget_graphs(self) -> None:
        self._graphs = {}

    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        params, rows = self._params_of(inputs, memos), len(memos)
        sizes = (
            [size for size in self._graphs if size >= rows] if logits.data_ptr() == self._captured_at else []
        )
        if sizes:
            place, replay = self._graphs[sizes[0]]
            place.copy_(self._packed(params, sizes[0]), non_blocking=True)
            replay()
        else:
            place = self._packed(params, rows).to(logits.device, non_blocking=True)
            self._draw(logits, tokens, place, any(memo.filtered for memo in memos))

    def _draw(self, logits: Tensor, tokens: Tensor, params: Tensor, filtered: bool) -> None:
        """`params`: those of every row one field after another."""
        begin, fields = 0, {}
        for name in _PARAMS.names or ():
            dtype = _PARAMS[name]
            end = begin + len(logits) * dtype.itemsize
            fields[name] = params[begin:end].view(_TORCH[dtype.base.name])
            begin = end
        filters = self._filters(fields["top_k"], fields["top_p"], fields["log_min_p"])
        keys = fields["keys"].view(-1, 2)
        rows = self._sampling.SamplingRows(fields["temperature"], filters, keys, filtered)
        drawn = self._sampling.sample_rows(logits, rows)
        tokens.copy_(drawn.where(tokens >= 0, tokens))

    def _packed(self, params: NDArray[Any], size: int) -> Tensor:
        """Pinned. Rows that fill up have temperature 0, the cheapest."""
        host = self._device.pinned(size * _PARAMS.itemsize)
        room, begin = host.numpy(), 0
        for name in _PARAMS.names or ():
            dtype = _PARAMS[name]
            end = begin + size * dtype.itemsize
            column = room[begin:end].view(dtype.base).reshape(size, *dtype.shape)
            column[: len(params)], column[len(params) :] = params[name], _FILLER[name]
            begin = end
        return host

    def _params_of(self, inputs: Sequence[SampleInput], memos: Sequence[Memo]) -> NDArray[Any]:
        """[R] of _PARAMS"""
        if memos != self._memos:  # the same objects in most steps, so this compares addresses
            self._memos = list(memos)
            fixed = [(memo.top_p, memo.temperature, memo.log_min_p, memo.top_k, (0, 0)) for memo in memos]
            self._params = np.array(fixed, _PARAMS)
        drawn = [row for row, memo in enumerate(memos) if memo.temperature]
        keys = b"".join([noise_key(memos[row].seed, inputs[row].position) for row in drawn])
        self._params["keys"][drawn] = np.frombuffer(keys, "<i4").reshape(-1, 2)
        return self._params


# The widest first, so that each field of all rows lies where its type may lie.
_PARAMS = np.dtype(
    [
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
        ("top_k", np.int32),
        ("keys", np.int32, 2),
    ]
)
_NO_PARAMS = np.empty(0, _PARAMS)
_FILLER = {"top_p": 1.0, "temperature": 0.0, "log_min_p": -np.inf, "top_k": 0, "keys": 0}
_TORCH = {"float64": torch.float64, "float32": torch.float32, "int32": torch.int32}
