"""Steps of requests that nobody has made, to see what the largest one takes and to compile what others will need.

Nothing of the cache is written, and one block of it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kernels.cpu.decoder import StepArrays
from workers.engine.request import Request
from workers.engine.sampler import SampleInput
from workers.engine.step_input import StepInput
from workers.gpu.buckets import Shape
from workers.protocol.messages import Sampling, Work

_EVERYTHING = Sampling(
    max_tokens=1, seed=0, temperature=1.0, top_k=50, top_p=0.9, logprobs=20, repetition_penalty=1.1
)
_DRAWS = Sampling(max_tokens=1, seed=0, temperature=1.0)


def largest_step(most: Shape, length: int, block_size: int, samples: bool) -> StepInput:
    """As many tokens and sequences as may be, in whole contexts, with all that sampling can be asked for.

    `samples`: whether this rank samples.
    """
    counts: list[int] = []
    for others in reversed(range(most.seqs)):  # that have a token each at least
        counts.append(min(most.tokens - sum(counts) - others, length))
    return made_up_step(counts, length, block_size, _EVERYTHING if samples else None)


def warm_steps(most: Shape, length: int, block_size: int, samples: bool) -> Iterator[StepInput]:
    """Of the sizes that Triton compiles apart: numbers that are 1, that 16 divides, and others; contexts cut up or not."""
    for seqs in (1, 3, 16):
        for sampling in (_DRAWS, _EVERYTHING):
            for chunk in (33, 48):
                # Of all tokens both kinds, too.
                chunk = min(chunk - (seqs - 1) % 16, most.tokens - seqs + 1, length)
                if chunk > 0 and seqs <= most.seqs:
                    for context in sorted({chunk, length}):
                        counts = [chunk, *[1] * (seqs - 1)]
                        yield made_up_step(counts, context, block_size, sampling if samples else None)


def made_up_step(counts: Sequence[int], length: int, block_size: int, sampling: Sampling | None) -> StepInput:
    """Sequences of so many tokens in contexts of `length`, all of which are sampled; None: nothing is."""
    seqs = len(counts)
    query_start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    positions = np.concatenate([np.arange(length - count, length) for count in counts]).astype(np.int32)
    arrays = StepArrays(
        token_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        slots=np.full(len(positions), -1, np.int64),
        query_start=query_start,
        lengths=np.full(seqs, length, np.int32),
        blocks=np.zeros(-(-length // block_size), np.int32),
        block_start=np.zeros(seqs, np.int32),
        rows=query_start[1:] - 1,
    )
    if sampling is None:
        return StepInput(arrays, [])
    work = Work(request_id="made-up", prompt=[0], sampling=sampling)
    return StepInput(arrays, [SampleInput(Request(work), 0) for _ in range(seqs)])
