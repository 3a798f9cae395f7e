"""Writes random models as GPTQ, AWQ and compressed-tensors store them, field by field from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.models.random_model import write_random_model

Fields = dict[str, Tensor]


def words(values: np.ndarray, bits: int, order: Iterable[int]) -> Tensor:
    """int32 [rows, columns * bits / 32]: field i of a word holds its column order[i]. One field after another."""
    per_word, order = 32 // bits, list(order)
    rows, columns = values.shape
    packed = np.zeros((rows, -(-columns // per_word)), np.uint64)
    for row in range(rows):
        for word in range(packed.shape[1]):
            for field, place in enumerate(order):
                column = word * per_word + place
                if column < columns:
                    packed[row, word] |= np.uint64(int(values[row, column]) << (field * bits))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


class Matrix:
    """Random integers q [n, k] in 0..2^bits - 1 with scale and zero [n, groups]: value = scale * (q - zero)."""

    def __init__(self, n: int, k: int, bits: int, group: int, symmetric: bool, seed: int) -> None:
        random = np.random.default_rng(seed)
        groups = 1 if group == -1 else k // group
        self.bits, self.n, self.k = bits, n, k
        self.q = random.integers(0, 2**bits, (n, k))
        self.scale = random.uniform(0.01, 0.1, (n, groups)).astype(np.float16)
        middle = 2 ** (bits - 1)
        self.zero = np.full((n, groups), middle) if symmetric else random.integers(0, 2**bits, (n, groups))

    def values(self) -> np.ndarray:
        repeats = self.k // self.scale.shape[1]
        scale, zero = self.scale.astype(np.float64).repeat(repeats, 1), self.zero.repeat(repeats, 1)
        return scale * (self.q - zero)


def gptq(matrix: Matrix, version: int = 1) -> Fields:
    bits = matrix.bits
    zero = (matrix.zero - (1 if version == 1 else 0)) % 2**bits
    straight = range(32 // bits)
    return {
        "qweight": words(matrix.q, bits, straight).T.contiguous(),
        "qzeros": words(zero.T, bits, straight),
        "scales": torch.from_numpy(matrix.scale.T.copy()),
        "g_idx": torch.arange(matrix.k, dtype=torch.int32) // (matrix.k // matrix.scale.shape[1]),
    }


def awq(matrix: Matrix) -> Fields:
    interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(matrix.q.T, 4, interleaved),
        "qzeros": words(matrix.zero.T, 4, interleaved),
        "scales": torch.from_numpy(matrix.scale.T.copy()),
    }


def compressed_packed(matrix: Matrix, asymmetric: bool = False) -> Fields:
    straight = range(32 // matrix.bits)
    fields = {
        "weight_packed": words(matrix.q, matrix.bits, straight),
        "weight_scale": torch.from_numpy(matrix.scale),
        "weight_shape": torch.tensor([matrix.n, matrix.k]),
    }
    if asymmetric:
        fields["weight_zero_point"] = words(matrix.zero.T, matrix.bits, straight).T.contiguous()
    return fields


def compressed_int(matrix: Matrix) -> Fields:
    return {
        "weight": torch.from_numpy((matrix.q - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(matrix.scale).bfloat16().float(),
    }


def write_quantized(
    path: Path,
    quantization: dict[str, Any],
    pack: Callable[[Matrix], Fields],
    *,
    bits: int,
    group: int,
    symmetric: bool,
    config: dict[str, Any] | None = None,
) -> dict[str, Matrix]:
    """A model directory whose projections are random matrices packed by `pack`; what was packed, by module."""
    write_random_model(path, {"intermediate_size": 192, **(config or {})})
    tensors = load_file(path / "model.safetensors")
    packed: dict[str, Matrix] = {}
    for seed, name in enumerate([name for name in tensors if "_proj.weight" in name]):
        module = name.removesuffix(".weight")
        n, k = tensors.pop(name).shape
        packed[module] = Matrix(n, k, bits, group, symmetric, seed)
        tensors |= {f"{module}.{end}": value.contiguous() for end, value in pack(packed[module]).items()}
    save_file(tensors, path / "model.safetensors")
    whole = json.loads((path / "config.json").read_text()) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(whole))
    return packed
