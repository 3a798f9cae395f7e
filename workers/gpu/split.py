"""A step in two, for a device that has no memory for it whole. Pure but for numpy.

The second part's tokens follow the first part's, also within a sequence: it finds the keys and values that the first has
written, as the next chunk of a prompt does.
"""

from __future__ import annotations

import numpy as np

from kernels.cpu.decoder import StepArrays


def split(arrays: StepArrays, at: int) -> tuple[StepArrays, StepArrays]:
    """Tokens [0, at) and [at, T), 0 < at < T."""
    return _part(arrays, 0, at), _part(arrays, at, len(arrays.token_ids))


def _part(arrays: StepArrays, begin: int, end: int) -> StepArrays:
    starts, ends = arrays.query_start[:-1], arrays.query_start[1:]
    here = (starts < end) & (ends > begin)
    stops = np.minimum(ends[here], end)
    counts = stops - np.maximum(starts[here], begin)
    sampled = (arrays.rows >= begin) & (arrays.rows < end)
    return StepArrays(
        token_ids=arrays.token_ids[begin:end],
        positions=arrays.positions[begin:end],
        slots=arrays.slots[begin:end],
        query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        lengths=(arrays.lengths[here] - (ends[here] - stops)).astype(np.int32),
        blocks=arrays.blocks,
        block_start=arrays.block_start[here],
        rows=(arrays.rows[sampled] - begin).astype(np.int32),
    )
