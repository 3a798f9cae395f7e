"""Rows of logits to tokens with the native library: one call for all rows.

The parameters of the rows are one array of C structs. A row that changes nothing from step to step is the same bytes
every time, so whoever calls keeps them (see workers/engine/native_sampler.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from kernels.cpu.library import Library

_POINTERS = ("seen", "counted", "counts", "biased", "bias", "forbidden")

# SamplingParams of src/sampling.h, field by field.
PARAMS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("key_first", np.uint32),
        ("key_second", np.uint32),
        ("num_top_logprobs", np.int32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("num_seen", np.int32),
        ("num_counted", np.int32),
        ("num_biased", np.int32),
        ("num_forbidden", np.int32),
        *((name, np.uintp) for name in _POINTERS),
    ],
    align=True,
)
RESULT = np.dtype([("token", np.int32), ("logprob", np.float32)], align=True)


def greedy_params() -> np.ndarray:
    """One row [1] of PARAMS with everything off."""
    row = np.zeros(1, PARAMS)
    row["top_p"] = row["repetition_penalty"] = 1.0
    row["num_top_logprobs"] = -1
    return row


@dataclass(slots=True)
class Drawn:
    """Views that hold until the next call."""

    results: np.ndarray  # [R] of RESULT; token -1: the row holds a NaN
    top_ids: np.ndarray  # [R, num_top] int32
    top_logprobs: np.ndarray  # [R, num_top] float32


class RowSampler:
    """Keeps the output arrays and the scratch memory between calls. Not thread-safe."""

    def __init__(self, library: Library, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        cdll = library.cdll
        cdll.hr_sample_scratch.restype = ctypes.c_int64
        cdll.hr_sample_scratch.argtypes = [ctypes.c_int]
        self._sample = cdll.hr_sample
        self._sample.restype = None
        self._sample.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 4,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self._scratch = np.empty(cdll.hr_sample_scratch(vocab_size), np.float32)
        self._reserve(1, 0)

    def _reserve(self, rows: int, num_top: int) -> None:
        self._rows, self._num_top = rows, num_top
        self._results = np.empty(rows, RESULT)
        self._top_ids = np.empty((rows, num_top), np.int32)
        self._top_logprobs = np.empty((rows, num_top), np.float32)
        self._addresses = tuple(a.ctypes.data for a in (self._results, self._top_ids, self._top_logprobs))

    def __call__(self, logits: int, stride: int, rows: int, params: int, num_top: int) -> Drawn:
        """`logits`: address of float32 [rows, vocab_size], rows `stride` floats apart, changed in place by penalties.
        `params`: address of [rows] of PARAMS. `num_top`: the most num_top_logprobs of any row, at least 0."""
        if rows > self._rows or num_top > self._num_top:
            self._reserve(max(rows, self._rows), max(num_top, self._num_top))
        self._sample(
            logits,
            rows,
            self.vocab_size,
            stride,
            params,
            *self._addresses,
            self._num_top,
            self._scratch.ctypes.data,
        )
        return Drawn(self._results[:rows], self._top_ids[:rows], self._top_logprobs[:rows])
