"""Sampling by the native library: the same tokens as workers/engine/sampler.py, with little Python per row.

What a request asks for becomes the bytes of one C struct, once; a step joins the bytes of its rows. Only rows that
differ from step to step are visited: those with noise (its key hangs on the position), penalties (they hang on the
tokens so far) and min_tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch

from kernels.cpu.library import Library
from kernels.cpu.sampling import PARAMS, Drawn, RowSampler, greedy_params
from kernels.sampling import COLDEST, noise_key
from workers.engine.occurrences import Occurrences
from workers.engine.plan import Sampled
from workers.engine.request import Request
from workers.engine.sampler import SampleInput
from workers.protocol.messages import TokenLogprobs


class NativeSampler:
    def __init__(self, library: Library, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._sample = RowSampler(library, vocab_size)
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._memos: list[Memo] = []  # also keeps alive what the structs point to
        self._params = np.empty(0, PARAMS)
        self._num_top = -1
        self._kept: list[array[int]] = []  # arrays that the step's structs point to

    def __call__(self, logits: torch.Tensor, inputs: Sequence[SampleInput]) -> list[Sampled]:
        """`logits` is float32 [len(inputs), vocab] on the CPU; rows are changed in place by bias and penalties."""
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise TypeError(f"logits are {logits.dtype} with strides {logits.stride()}, not rows of float32")
        params = self.prepare(inputs)
        drawn = self._sample(
            logits.data_ptr(), logits.stride(0), len(inputs), params.ctypes.data, max(self._num_top, 0)
        )
        return self._sampled(drawn)

    def prepare(self, inputs: Sequence[SampleInput]) -> np.ndarray:
        """[len(inputs)] of PARAMS, valid until the next call."""
        memos = [given.request.sampler_memo or self._remember(given.request) for given in inputs]
        # Equal bytes would not do: an array of a new request may lie where one of an ended request lay, whose row
        # holds what `_move` wrote.
        if memos != self._memos:  # the same objects in most steps, so this compares addresses
            self._memos = memos
            self._params = np.frombuffer(bytearray().join([memo.record for memo in memos]), PARAMS)
            self._num_top = int(self._params["num_top_logprobs"].max(initial=-1))
        self._kept.clear()
        drawing = []
        for row, memo in enumerate(memos):
            if memo.draws:
                drawing.append(row)
            if memo.moves:
                self._move(self._params[row], memo, inputs[row])
        if drawing:
            keys = b"".join([noise_key(memos[r].seed, inputs[r].position) for r in drawing])
            pairs = np.frombuffer(keys, "<u4").reshape(-1, 2)
            self._params["key_first"][drawing] = pairs[:, 0]
            self._params["key_second"][drawing] = pairs[:, 1]
        return self._params

    def _remember(self, request: Request) -> Memo:
        memo = request.sampler_memo = Memo(request, self._eos_token_ids, self._vocab_size)
        return memo

    def _move(self, row: np.void, memo: Memo, given: SampleInput) -> None:
        request = given.request
        row["num_forbidden"] = len(memo.ends) if given.position < request.sampling.min_tokens else 0
        if memo.seen is not None:
            seen = memo.seen.at(request.token_ids, given.draft)
            row["num_seen"], row["seen"] = len(seen.tokens), seen.tokens.buffer_info()[0]
            self._kept.append(seen.tokens)
        if memo.counted is not None:
            counted = memo.counted.at(request.token_ids, given.draft)
            row["num_counted"], row["counted"] = len(counted.tokens), counted.tokens.buffer_info()[0]
            row["counts"] = counted.counts.buffer_info()[0]
            self._kept += [counted.tokens, counted.counts]

    def _sampled(self, drawn: Drawn) -> list[Sampled]:
        tokens = drawn.results["token"].tolist()
        if self._num_top < 0:
            return [Sampled(token, None) for token in tokens]
        counts = self._params["num_top_logprobs"].tolist()
        logprobs = drawn.results["logprob"].tolist()
        return [
            Sampled(token, _logprobs(drawn, row, logprobs[row], counts[row]) if token >= 0 else None)
            for row, token in enumerate(tokens)
        ]


class Memo:
    """What the sampler keeps of one request between steps."""

    __slots__ = ("_bias", "_biased", "counted", "draws", "ends", "moves", "record", "seed", "seen")

    def __init__(self, request: Request, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        sampling = request.sampling
        self.seed = sampling.seed
        self.draws = sampling.temperature >= COLDEST
        self.seen = Occurrences() if sampling.repetition_penalty != 1.0 else None
        penalized = sampling.presence_penalty or sampling.frequency_penalty
        self.counted = Occurrences(request.num_prompt_tokens) if penalized else None
        self.moves = bool(self.seen or self.counted or sampling.min_tokens)
        self.ends = array("i", [*eos_token_ids, *sampling.stop_token_ids])
        self._biased = array("i", sampling.logit_bias)
        self._bias = array("f", sampling.logit_bias.values())
        params = greedy_params()
        if self.draws:
            for name in ("temperature", "top_p", "min_p", "top_k"):
                params[name] = getattr(sampling, name)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            params[name] = getattr(sampling, name)
        if sampling.logprobs is not None:
            params["num_top_logprobs"] = min(sampling.logprobs, vocab_size)
        params["num_biased"] = len(self._biased)
        params["biased"] = self._biased.buffer_info()[0]
        params["bias"] = self._bias.buffer_info()[0]
        params["forbidden"] = self.ends.buffer_info()[0]
        self.record = params.tobytes()


def _logprobs(drawn: Drawn, row: int, logprob: float, count: int) -> TokenLogprobs | None:
    if count < 0:
        return None
    ids, values = drawn.top_ids[row, :count].tolist(), drawn.top_logprobs[row, :count].tolist()
    return TokenLogprobs(logprob=logprob, top=list(zip(ids, values, strict=True)))
