"""What GPTQ, AWQ and compressed-tensors have in common: integers in 32-bit words, and value = scale * (q - zero)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.models.errors import ModelError
from workers.models.quantized import GROUP, Q8_OFFSET, ChannelWeight, GroupedWeight, Quantized, widest_shared

if TYPE_CHECKING:
    from torch import Tensor


def unpack_words(words: Tensor, bits: int) -> NDArray[np.uint8]:
    """int32 [rows, w] -> [rows, w * 32 / bits], the lowest bits of a word first. bits: 4 or 8."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)  # little-endian
    if bits == 8:
        return data
    values = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=values[..., 0])
    np.right_shift(data, 4, out=values[..., 1])
    return values.reshape(data.shape[0], -1)


def neutral(
    module: str, q: NDArray[np.uint8], scale: NDArray[np.float32], zero: NDArray[np.uint8], bits: int
) -> Quantized:
    """q [n, k] unsigned; scale, zero [n, groups], groups a divisor of k. Raises ModelError.

    Scales become float16, and 4-bit zero points minima: what is lost is 2^-12 of a group's range.
    """
    k, groups = q.shape[1], scale.shape[1]
    if bits == 8 and (zero != Q8_OFFSET).any():
        raise ModelError(
            f"{module}: 8-bit weights with zero points are not read; symmetric ones are. "
            "Use a symmetric or a 4-bit checkpoint"
        )
    if bits == 8 and groups == 1:
        return ChannelWeight((q - np.uint8(Q8_OFFSET)).view(np.int8), np.ascontiguousarray(scale[:, 0]))
    repeats, shared = k // GROUP // groups, widest_shared(k // groups)
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16)
        m = (-scale * zero).astype(np.float16)
    if not np.isfinite(d).all() or not np.isfinite(m).all():
        raise ModelError(f"{module} has scales beyond float16's range, which the kernels read")
    d = d.repeat(repeats, 1)
    q = np.ascontiguousarray(q)
    if bits == 8:
        return GroupedWeight("q8", q, d, shared=shared)
    return GroupedWeight("q4", q, d, m.repeat(repeats, 1), shared=shared)


def need(tensor: Tensor | None) -> Tensor:
    """A tensor whose presence was checked from the headers."""
    assert tensor is not None
    return tensor


def floats(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.float().numpy()
    return values


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """config[key], which must be one of `allowed`. Raises ModelError naming what came and what is allowed."""
    value = config.get(key, default)
    # True == 1 in Python, but not in a configuration.
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        raise ModelError(
            f"config.json: quantization_config has {key} {value!r}; read are {', '.join(map(repr, allowed))}"
        )
    return value


def groups_of(group_size: int, k: int, bits: int) -> int:
    """Groups of a row; group_size -1 is the whole row. Raises ModelError."""
    size = k if group_size == -1 else group_size
    if size == k and bits == 8:
        return 1  # a scale for each output, which the kernels have for any k
    if k % size or size % GROUP:
        raise ModelError(
            f"quantization groups of {size} do not divide {k} inputs into multiples of {GROUP}, which the kernels read"
        )
    return k // size
