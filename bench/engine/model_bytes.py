"""What one step must at least read and compute: bytes and FLOPs of a model from its `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from workers.models.spec import DecoderSpec

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]

_FLOAT32 = 4
_GROUP = 32  # weights that share a float16 scale, and in 4 bits a float16 minimum


def matrix_bytes(rows: int, columns: int, weight_format: WeightFormat, *, head: bool = False) -> float:
    """Of one matrix [out, in] with its scales. int4 keeps the head in 8 bits by groups, see workers/models."""
    weights = rows * columns
    if weight_format == "int8" or (weight_format == "int4" and head):
        return weights * (1 + 2 / _GROUP)
    if weight_format == "int4":
        return weights * (0.5 + 4 / _GROUP)
    return weights * {"fp32": 4, "bf16": 2}[weight_format]


def matrices(spec: DecoderSpec) -> Iterator[tuple[int, int]]:
    """[out, in] of every projection of every layer, q, k, v and gate, up apart."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    for _ in range(spec.num_layers):
        yield from ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
        yield from ((inner, hidden), (inner, hidden), (hidden, inner))


def weight_bytes(spec: DecoderSpec, weight_format: WeightFormat) -> float:
    """Read by every step: projections, norms and the head. A tied head counts once; of an embedding that is no head
    only single rows are read, which is nothing beside it."""
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    if spec.qk_norm:
        norms += 2 * spec.num_layers * spec.head_dim
    projections = sum(matrix_bytes(rows, columns, weight_format) for rows, columns in matrices(spec))
    head = matrix_bytes(spec.vocab_size, spec.hidden_size, weight_format, head=True)
    return projections + head + norms * _FLOAT32


@dataclass(frozen=True)
class Work:
    """Of one step, or of all steps of a prompt."""

    bytes: float
    flops: float

    def memory_floor_s(self, bytes_per_s: float) -> float:
        return self.bytes / bytes_per_s

    def arithmetic_floor_s(self, flops_per_s: float) -> float:
        return self.flops / flops_per_s

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The larger of the two: nothing can be faster, even where reading hides behind computing."""
        return max(self.memory_floor_s(bytes_per_s), self.arithmetic_floor_s(flops_per_s))


def decode_work(
    spec: DecoderSpec, weight_format: WeightFormat, kv_token_bytes: float, batch: int, context: int
) -> Work:
    """One step of `batch` sequences, each with `context` tokens in the KV cache."""
    seen = sum(min(context, window or context) for window in spec.windows)  # tokens, over the layers
    return Work(
        bytes=weight_bytes(spec, weight_format) + batch * seen / spec.num_layers * kv_token_bytes,
        flops=batch * (_linear_flops(spec) + _head_flops(spec) + _attention_flops(spec, seen)),
    )


def prefill_work(
    spec: DecoderSpec, weight_format: WeightFormat, kv_token_bytes: float, tokens: int, chunk: int
) -> Work:
    """One prompt of `tokens` tokens in chunks; logits of its last token only."""
    steps = -(-tokens // chunk)
    seen = sum(
        sum(min(position + 1, window or tokens) for position in range(tokens)) for window in spec.windows
    )
    read_back = sum(min(start, tokens) for start in range(chunk, tokens, chunk))  # KV of earlier chunks
    return Work(
        bytes=steps * weight_bytes(spec, weight_format) + (tokens + read_back) * kv_token_bytes,
        flops=tokens * _linear_flops(spec) + _head_flops(spec) + _attention_flops(spec, seen),
    )


def _linear_flops(spec: DecoderSpec) -> float:
    return 2.0 * sum(rows * columns for rows, columns in matrices(spec))


def _head_flops(spec: DecoderSpec) -> float:
    return 2.0 * spec.vocab_size * spec.hidden_size


def _attention_flops(spec: DecoderSpec, seen: int) -> float:
    """q k^T and p v: two products for each head and each token that is seen."""
    return 4.0 * spec.num_heads * spec.head_dim * seen
