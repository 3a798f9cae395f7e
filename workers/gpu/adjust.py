"""Penalties, bias and barred tokens of all rows at once, in the order and the roundings of workers/engine/sampler.py.

Every entry is a place in the logits, row * vocab + token, worked out on the host; a step of a thousand of them costs one
copy and a few launches, and a device that keeps counts of every token of every request is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.sampler import SampleInput
from workers.gpu.device import Device
from workers.gpu.memo import Memo
from workers.gpu.upload import upload


def adjust(logits: Tensor, inputs: Sequence[SampleInput], memos: Sequence[Memo], device: Device) -> None:
    """Change float32 [R, vocab], contiguous, in place."""
    vocab = logits.shape[1]
    seen, counted, biased, barred = _Entries(), _Entries(), _Entries(), _Entries()
    for row, (given, memo) in enumerate(zip(inputs, memos, strict=True)):
        if not memo.adjusts:
            continue
        first, token_ids = row * vocab, given.request.token_ids
        if memo.seen is not None:
            tokens = np.array(memo.seen.at(token_ids, given.draft).tokens, np.int64)
            seen.add(first + tokens, memo.repetition_penalty)
        if memo.counted is not None:
            counts = memo.counted.at(token_ids, given.draft)
            tokens = np.array(counts.tokens, np.int64)
            often = np.array(counts.counts, np.float32)
            counted.add(first + tokens, often, memo.frequency_penalty, memo.presence_penalty)
        if memo.biased:
            biased.add(first + np.array(memo.biased, np.int64), np.array(memo.bias, np.float32))
        if given.position < memo.min_tokens and memo.ends:
            barred.add(first + np.array(memo.ends, np.int64))
    kinds = (seen, counted, biased, barred)
    sent = iter(upload([array for kind in kinds for array in kind.joined()], device))
    flat = logits.view(-1)
    if seen.places:
        places, penalty = next(sent), next(sent)
        values = flat.index_select(0, places)
        flat.index_copy_(0, places, torch.where(values > 0, values / penalty, values * penalty))
    if counted.places:
        places, times, frequency, presence = (next(sent) for _ in range(4))
        flat.index_copy_(0, places, flat.index_select(0, places) - (presence + frequency * times))
    if biased.places:
        places, bias = next(sent), next(sent)
        flat.index_copy_(0, places, flat.index_select(0, places) + bias)
    if barred.places:
        flat.index_fill_(0, next(sent), -torch.inf)


class _Entries:
    """Places int64, and of each some float32 values."""

    def __init__(self) -> None:
        self.places: list[NDArray[np.int64]] = []
        self._values: list[list[NDArray[np.float32]]] = []

    def add(self, places: NDArray[np.int64], *values: NDArray[np.float32] | float) -> None:
        if not len(places):
            return
        self.places.append(places)
        self._values.append([np.broadcast_to(np.float32(value), places.shape) for value in values])

    def joined(self) -> list[NDArray[Any]]:
        """Empty where there is none."""
        if not self.places:
            return []
        columns = zip(*self._values, strict=True)
        return [np.concatenate(self.places), *(np.concatenate(column) for column in columns)]
