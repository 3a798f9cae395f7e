"""What one step must at least read and compute: bytes and FLOPs of a model from its `DecoderSpec`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from workers.models.spec import DecoderSpec, MoeSpec

WeightFormat = Literal["fp32", "bf16", "fp8", "int8", "int4"]

_FLOAT32 = 4
_GROUP = 32  # weights that share a float16 scale, and in 4 bits a float16 minimum


def matrix_bytes(rows: int, columns: int, weight_format: WeightFormat, *, head: bool = False) -> float:
    """Of one matrix [out, in] with its scales. int4 keeps the head in 8 bits by groups, see workers/models; fp8 has a
    float32 scale for each output channel."""
    weights = rows * columns
    if weight_format == "int8" or (weight_format in ("int4", "fp8") and head):
        return weights * (1 + 2 / _GROUP)
    if weight_format == "fp8":
        return weights + rows * _FLOAT32
    if weight_format == "int4":
        return weights * (0.5 + 4 / _GROUP)
    return weights * {"fp32": 4, "bf16": 2}[weight_format]


Matrix = tuple[int, int]  # [out, in]


def matrices(spec: DecoderSpec) -> Iterator[Matrix]:
    """Every projection that a token goes through, q, k, v and gate, up apart; of experts those that it takes."""
    for layer in range(spec.num_layers):
        yield from _attention_matrices(spec)
        moe = spec.sparse(layer)
        if moe is None:
            yield from _mlp_matrices(spec.hidden_size, spec.intermediate_size)
            continue
        yield from _sparse_matrices(spec, moe)
        for _ in range(moe.top_k):
            yield from _mlp_matrices(spec.hidden_size, moe.intermediate_size)


def _attention_matrices(spec: DecoderSpec) -> Iterator[Matrix]:
    hidden, mla = spec.hidden_size, spec.mla
    if mla is None:
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        yield from ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
        return
    q = spec.num_heads * mla.query_dim
    if mla.q_lora_rank is None:
        yield q, hidden
    else:
        yield from ((mla.q_lora_rank, hidden), (q, mla.q_lora_rank))
    yield mla.latent_dim, hidden
    yield spec.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_lora_rank
    yield hidden, spec.num_heads * mla.value_dim


def _sparse_matrices(spec: DecoderSpec, moe: MoeSpec) -> Iterator[Matrix]:
    """What every token goes through besides its routed experts."""
    yield moe.num_experts, spec.hidden_size
    if moe.shared_intermediate_size:
        yield from _mlp_matrices(spec.hidden_size, moe.shared_intermediate_size)
    if moe.shared_gate:
        yield 1, spec.hidden_size


def _mlp_matrices(hidden: int, inner: int) -> tuple[Matrix, Matrix, Matrix]:
    return (inner, hidden), (inner, hidden), (hidden, inner)


def weight_bytes(spec: DecoderSpec, weight_format: WeightFormat, tokens: int | None = None) -> float:
    """Read by a step of `tokens` tokens: projections, norms and the head. A tied head counts once; of an embedding that
    is no head only single rows are read, which is nothing beside it.

    Of experts as many as the tokens are expected to take when all are equally liked; None: every one.
    """
    total = matrix_bytes(spec.vocab_size, spec.hidden_size, weight_format, head=True)
    for layer in range(spec.num_layers):
        total += _bytes(_attention_matrices(spec), weight_format)
        moe = spec.sparse(layer)
        if moe is None:
            total += _bytes(_mlp_matrices(spec.hidden_size, spec.intermediate_size), weight_format)
            continue
        expert = _bytes(_mlp_matrices(spec.hidden_size, moe.intermediate_size), weight_format)
        total += _bytes(_sparse_matrices(spec, moe), weight_format) + experts_read(moe, tokens) * expert
        total += moe.num_experts * _FLOAT32 * moe.correction_bias
    return total + _norm_weights(spec) * _FLOAT32


def experts_read(moe: MoeSpec, tokens: int | None) -> float:
    """Expected number of different experts of a layer that `tokens` tokens take."""
    if tokens is None:
        return moe.num_experts
    return moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens)


def _bytes(of: Iterable[Matrix], weight_format: WeightFormat) -> float:
    return sum(matrix_bytes(rows, columns, weight_format) for rows, columns in of)


def _norm_weights(spec: DecoderSpec) -> int:
    layer = 2 * spec.hidden_size
    if spec.mla is not None:
        layer += spec.mla.kv_lora_rank + (spec.mla.q_lora_rank or 0)
    elif spec.qk_norm:
        heads = spec.num_heads + spec.num_kv_heads if spec.qk_norm_whole else 2
        layer += heads * spec.head_dim
    return spec.num_layers * layer + spec.hidden_size


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
        bytes=weight_bytes(spec, weight_format, batch) + batch * seen / spec.num_layers * kv_token_bytes,
        flops=batch * (_linear_flops(spec) + _head_flops(spec) + _attention_flops(spec, seen)),
    )


def prefill_work(
    spec: DecoderSpec, weight_format: WeightFormat, kv_token_bytes: float, tokens: int, chunk: int
) -> Work:
    """One prompt of `tokens` tokens in chunks; logits of its last token only."""
    seen = sum(
        sum(min(position + 1, window or tokens) for position in range(tokens)) for window in spec.windows
    )
    weights = sum(
        weight_bytes(spec, weight_format, min(chunk, tokens - start)) for start in range(0, tokens, chunk)
    )
    read_back = sum(min(start, tokens) for start in range(chunk, tokens, chunk))  # KV of earlier chunks
    return Work(
        bytes=weights + (tokens + read_back) * kv_token_bytes,
        flops=tokens * _linear_flops(spec) + _head_flops(spec) + _attention_flops(spec, seen),
    )


def _linear_flops(spec: DecoderSpec) -> float:
    return 2.0 * sum(rows * columns for rows, columns in matrices(spec))


def _head_flops(spec: DecoderSpec) -> float:
    return 2.0 * spec.vocab_size * spec.hidden_size


def _attention_flops(spec: DecoderSpec, seen: int) -> float:
    """q k^T and p v: two products for each head and each token that is seen."""
    values = spec.head_dim if spec.mla is None else spec.mla.kv_lora_rank
    return 2.0 * spec.num_heads * (spec.head_dim + values) * seen
