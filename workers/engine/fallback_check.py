"""Whether a model gives in chunks over pages what it gives in one piece.

Some tokens go through it with its own attention, then in parts beside another sequence with ours, and the logits must
agree. So a family that nobody has listed is either run right or refused; nothing has to be known of it: a state that
chunks lose, positions that it counts itself, scores that it changes on the way all show here.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.attention_step import AttentionStep
from kernels.cpu.decoder import StepArrays
from workers.engine.step_input import StepBuilder
from workers.models.errors import ModelError
from workers.models.fallback import FallbackModel
from workers.models.fallback_spec import UNREADABLE

# Of the spread of a row's logits; a wrong position or a lost state shifts them by about as much as they spread.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_TOLERANCE_QUANTIZED = 0.15  # of an int8 or fp8 cache
_ROWS_WITHIN = 0.75  # a rounded router may send some token to other experts

_LENGTH = 24  # tokens of each sequence
_BLOCK_SIZE = 4
_BLOCK_TABLES = (array("i", (11, 9, 7, 5, 3, 1)), array("i", (0, 2, 4, 6, 8, 10)))
# Tokens [begin, end) of the first and of the second sequence, or None, by step.
_STEPS = (((0, 8), None), ((8, 23), (0, 7)), ((23, 24), (7, 8)), (None, (8, 24)))
_FIRST_ROWS = (8, 0)  # that are compared: not the first chunk, which any model gets right


@torch.inference_mode()
def check_chunks(model: FallbackModel) -> None:
    """Raises ModelError where logits differ, or nothing comes out at all."""
    name, spec = model.spec.class_name, model.spec
    if spec.max_position < _LENGTH:
        raise ModelError(f"{name} has a context of {spec.max_position} tokens; at least {_LENGTH} are needed")
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, spec.vocab_size, (2, _LENGTH), generator=generator)
    try:
        paged = _in_chunks(model, sequences)
        whole = [model.own_logits(one.to(model.device)) for one in sequences]
    except UNREADABLE as error:
        raise ModelError(f"{name} cannot run over a paged KV cache: {error}") from error
    off = torch.cat(
        [
            _distance(got[first:], expected[first:])
            for got, expected, first in zip(paged, whole, _FIRST_ROWS, strict=True)
        ]
    )
    tolerance = _TOLERANCE[model.dtype] if model.kv_wire is None else _TOLERANCE_QUANTIZED
    share = float((off < tolerance).float().mean())
    if share < _ROWS_WITHIN:
        raise ModelError(
            f"{name} does not compute in chunks over a paged KV cache what it computes in one piece: logits differ by "
            f"{float(off.median()):.2g} of their spread (median)"
        )


def _distance(got: Tensor, expected: Tensor) -> Tensor:
    """Of each row, in parts of the expected row's spread; NaN, which is within nothing, where either is."""
    return (got - expected).std(-1) / expected.std(-1).clamp_min(1e-12)


def _in_chunks(model: FallbackModel, sequences: Tensor) -> list[Tensor]:
    """Logits [_LENGTH, vocab] of the two sequences, which share steps."""
    kv_cache = model.new_kv_cache(sum(map(len, _BLOCK_TABLES)), _BLOCK_SIZE)
    parts: list[list[Tensor]] = [[], []]
    for step in _STEPS:
        builder = StepBuilder(_BLOCK_SIZE)
        counts = []
        for piece, sequence, table in zip(step, sequences.tolist(), _BLOCK_TABLES, strict=True):
            begin, end = piece or (0, 0)
            counts.append(end - begin)
            if piece:
                builder.add(sequence[begin:end], begin, table, end - begin)
        found = _forward(model, builder.arrays(), kv_cache)
        logits = model.logits(found)
        for part, rows in zip(parts, torch.split(logits, counts), strict=True):
            part.append(rows)
    return [torch.cat(part) for part in parts]


def _forward(model: FallbackModel, arrays: StepArrays, kv_cache: Tensor) -> Tensor:
    def put(values: NDArray[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=model.device)

    ends = [*arrays.block_start[1:], len(arrays.blocks)]
    tables = [torch.tensor(arrays.blocks[a:b]) for a, b in zip(arrays.block_start, ends, strict=True)]
    step = AttentionStep.of(
        arrays.query_start.tolist(),
        arrays.lengths.tolist(),
        pad_sequence(tables, True).to(model.device),
        put(arrays.slots),
    )
    return model.forward(put(arrays.token_ids), put(arrays.positions), kv_cache, step, put(arrays.rows))
