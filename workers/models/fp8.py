"""float8 (e4m3) checkpoints, `weight` [n, k] beside its scales.

    fp8, with weight_block_size    weight_scale_inv, one for each square of weights: DeepSeek-V3 (arXiv 2412.19437, section
                                   3.3.2), FP8 releases of Qwen3
    fp8 without it                 weight_scale of the whole matrix or of each output
    compressed-tensors, float      weight_scale of the whole matrix, of each output or of each square

Scales of activations (input_scale) are not used: kernels that round activations find a scale for each row, which is at
least as exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.models.errors import ModelError
from workers.models.quantized import FP8_GROUP, Fp8Weight
from workers.models.stored_integers import floats, need

if TYPE_CHECKING:
    from torch import Tensor


def fp8_form(given: Mapping[str, Any]) -> BlockFp8Form | PlainFp8Form:
    """Of quant_method fp8. Raises ModelError."""
    if given.get("weight_block_size") is not None:
        return BlockFp8Form(given["weight_block_size"], "weight_scale_inv")
    return PlainFp8Form()


class BlockFp8Form:
    """See `stored_form.StoredForm`; blocks of other widths than 128 inputs come as floats."""

    optional: tuple[str, ...] = ("input_scale",)

    def __init__(self, block: Any, marker: str) -> None:
        if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(_is_size(one) for one in block):
            raise ModelError(
                f"config.json: fp8 with weight_block_size {block!r} is not read; two positive integers are"
            )
        self.marker = marker
        self._block_rows, self._block_columns = int(block[0]), int(block[1])

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {
            "weight": (n, k),
            self.marker: (-(-n // self._block_rows), -(-k // self._block_columns)),
        }

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Fp8Weight | Tensor:
        weight, scale = _float8(module, need(tensor("weight"))), need(tensor(self.marker)).float()
        by_row = scale.repeat_interleave(self._block_rows, 0)[:n]
        if self._block_columns != FP8_GROUP:
            return weight.float() * by_row.repeat_interleave(self._block_columns, 1)[:, :k]
        return Fp8Weight(_bits(weight), by_row.contiguous().numpy(), FP8_GROUP)


class PlainFp8Form:
    """See `stored_form.StoredForm`."""

    marker = "weight_scale"
    optional: tuple[str, ...] = ("weight_scale", "input_scale")  # a scale of one number has many shapes

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n, k)}

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Fp8Weight:
        weight, scale = _float8(module, need(tensor("weight"))), floats(need(tensor("weight_scale")))
        if scale.size not in (1, n):
            raise ModelError(
                f"{module}.weight_scale has shape {list(scale.shape)}; one scale is read, or one for each of {n} outputs"
            )
        by_row = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1, 1), (n, 1)))
        return Fp8Weight(_bits(weight), by_row, k)


def _float8(module: str, weight: Tensor) -> Tensor:
    if str(weight.dtype) != "torch.float8_e4m3fn":
        raise ModelError(f"{module}.weight is {weight.dtype}, not float8_e4m3fn as fp8 checkpoints have it")
    return weight


def _bits(weight: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import torch

    bits: np.ndarray[Any, np.dtype[np.uint8]] = weight.view(torch.uint8).numpy()
    return bits


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
