"""The draw of all rows: Triton's kernels, which leave everything on the device, or one row after another in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from kernels.sampling import noise_key, sample
from workers.engine.sampler import SampleInput
from workers.gpu.device import Device
from workers.gpu.memo import Memo
from workers.gpu.upload import upload


class Draw(Protocol):
    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        """logits float32 [R, vocab], bias and penalties applied -> tokens int64 [R], whose negative ones stay."""


class TorchDraw:
    """Waits for the device."""

    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        found = tokens.tolist()
        for row, (given, memo) in enumerate(zip(inputs, memos, strict=True)):
            if found[row] < 0 or memo.plain:
                continue
            sampling = given.request.sampling
            found[row] = sample(
                logits[row],
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=sampling.seed,
                position=given.position,
            )
        tokens.copy_(tokens.new_tensor(found))


class TritonDraw:
    def __init__(self, device: Device) -> None:
        """Raises ImportError where Triton is not installed."""
        from kernels.triton import sampling
        from kernels.triton.sampling_cut import Filters

        self._sampling, self._filters = sampling, Filters
        self._device = device
        self._memos: list[Memo] = []
        self._params: list[np.ndarray] = []

    def __call__(
        self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo]
    ) -> None:
        if memos != self._memos:  # the same objects in most steps, so this compares addresses
            self._memos = list(memos)
            self._params = [
                np.array([memo.top_p for memo in memos], np.float64),
                np.array([memo.temperature for memo in memos], np.float32),
                np.array([memo.log_min_p for memo in memos], np.float32),
                np.array([memo.top_k for memo in memos], np.int32),
            ]
        top_p, temperature, log_min_p, top_k, keys = upload(
            [*self._params, _keys(inputs, memos)], self._device
        )
        filters = self._filters(top_k, top_p, log_min_p)
        filtered = any(memo.filtered for memo in memos)
        rows = self._sampling.SamplingRows(temperature, filters, keys, filtered)
        drawn = self._sampling.sample_rows(logits, rows)
        tokens.copy_(drawn.where(tokens >= 0, tokens))


_NO_KEY = bytes(8)


def _keys(inputs: Sequence[SampleInput], memos: Sequence[Memo]) -> np.ndarray:
    """int32 [R, 2]"""
    keys = [
        noise_key(memo.seed, given.position) if memo.temperature else _NO_KEY
        for given, memo in zip(inputs, memos, strict=True)
    ]
    return np.frombuffer(b"".join(keys), "<i4").reshape(-1, 2)
