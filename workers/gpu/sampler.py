"""Sampling on the device: the tokens of workers/engine/sampler.py, which stay there for the next step.

What goes back to the host, tokens and log-probabilities, is queued behind them and read when the step is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from workers.engine.plan import NOT_A_NUMBER, Sampled
from workers.engine.sampler import SampleInput
from workers.gpu.adjust import adjust
from workers.gpu.device import Device
from workers.gpu.draw import Draw
from workers.gpu.graphs import Graphs
from workers.gpu.memo import Memo
from workers.gpu.upload import upload
from workers.protocol.messages import TokenLogprobs

Results = Callable[[], list[Sampled]]  # to be called when the device has passed what was queued


def choose_best(logits: Tensor, tokens: Tensor) -> None:
    """logits float32 [R, vocab] -> tokens int64 [R]: the best one's first id, NOT_A_NUMBER of a row with a NaN."""
    best, ids = logits.max(dim=-1)  # NaN where there is one
    tokens.copy_(ids.masked_fill(best.isnan(), NOT_A_NUMBER))


class DeviceSampler:
    def __init__(self, device: Device, draw: Draw, eos_token_ids: frozenset[int]) -> None:
        self._device, self._draw, self._eos_token_ids = device, draw, eos_token_ids

    def capture(self, graphs: Graphs, logits: Tensor, tokens: Tensor, sizes: Collection[int]) -> None:
        """Draws from the first rows of these very buffers, as many as `sizes` say, run in graphs from here on."""
        self._draw.capture(graphs, logits, tokens, sizes)

    def forget_graphs(self) -> None:
        self._draw.forget_graphs()

    def __call__(self, logits: Tensor, tokens: Tensor, inputs: Sequence[SampleInput]) -> Results:
        """Queue the choice of R tokens. logits float32 [R, vocab], changed in place where bias or penalties apply.

        tokens int64 [R] on the device: as choose_best has left them; the chosen ones afterwards.
        """
        memos = [given.request.sampler_memo or self._remember(given) for given in inputs]
        logprobs = _Logprobs.of(logits, memos, self._device)
        if not all(memo.plain for memo in memos):
            if any(memo.adjusts for memo in memos):
                adjust(logits, inputs, memos, self._device)
            self._draw(logits, tokens, inputs, memos)
        host = _to_host(tokens, self._device)
        if logprobs is None:
            return lambda: [Sampled(token, None) for token in host.tolist()]
        logprobs.finish(tokens)
        return lambda: logprobs.beside(host.tolist())

    def _remember(self, given: SampleInput) -> Memo:
        memo = given.request.sampler_memo = Memo(given.request, self._eos_token_ids)
        return memo


class _Logprobs:
    """Of the rows that want some: the model's own, before bias, penalties and temperature."""

    def __init__(self, raw: Tensor, rows: Tensor, counts: list[int | None], device: Device) -> None:
        self._raw, self._rows, self._counts, self._device = raw, rows, counts, device

    @staticmethod
    def of(logits: Tensor, memos: Sequence[Memo], device: Device) -> _Logprobs | None:
        counts = [memo.logprobs for memo in memos]
        wanted = [row for row, count in enumerate(counts) if count is not None]
        if not wanted:
            return None
        [rows] = upload([np.array(wanted, np.int64)], device)
        return _Logprobs(torch.log_softmax(logits.index_select(0, rows), dim=-1), rows, counts, device)

    def finish(self, tokens: Tensor) -> None:
        """Queue what goes to the host: of each row its token's first, then the best ones."""
        chosen = tokens.index_select(0, self._rows).clamp_min(0)[:, None]
        most = min(max(count for count in self._counts if count is not None), self._raw.shape[1])
        values, ids = self._raw.topk(most, dim=-1)
        values = torch.cat((self._raw.gather(1, chosen), values), 1)
        self._values = _to_host(values, self._device)
        self._ids = _to_host(ids, self._device)
        del self._raw

    def beside(self, tokens: list[int]) -> list[Sampled]:
        found = iter(zip(self._values.tolist(), self._ids.tolist(), strict=True))
        return [
            Sampled(token, None if count is None else _logprobs(token, count, *next(found)))
            for token, count in zip(tokens, self._counts, strict=True)
        ]


def _to_host(values: Tensor, device: Device) -> Tensor:
    host = device.pinned(values.nbytes).view(values.dtype).view(values.shape)
    return host.copy_(values, non_blocking=True)


def _logprobs(token: int, count: int, values: list[float], ids: list[int]) -> TokenLogprobs | None:
    if token == NOT_A_NUMBER:
        return None
    return TokenLogprobs(logprob=values[0], top=list(zip(ids[:count], values[1 : 1 + count], strict=True)))
