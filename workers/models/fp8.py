"""float8 checkpoints with a scale for each square of weights (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

No kernel here multiplies in float8: the values are widened when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from workers.models.errors import ModelError
from workers.models.stored_integers import need

if TYPE_CHECKING:
    from torch import Tensor


class Fp8Form:
    """See `stored_form.StoredForm`; what it reads are floats."""

    marker = "weight_scale_inv"
    optional: tuple[str, ...] = ("input_scale",)

    def __init__(self, given: Mapping[str, Any]) -> None:
        block = given.get("weight_block_size")
        if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(_is_size(one) for one in block):
            raise ModelError(
                f"config.json: fp8 with weight_block_size {block!r} is not read; two positive integers are"
            )
        self._block_rows, self._block_columns = int(block[0]), int(block[1])

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {
            "weight": (n, k),
            self.marker: (-(-n // self._block_rows), -(-k // self._block_columns)),
        }

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Tensor:
        """float32 [n, k]."""
        weight, scale = need(tensor("weight")), need(tensor(self.marker))
        if str(weight.dtype) != "torch.float8_e4m3fn":
            raise ModelError(
                f"{module}.weight is {weight.dtype}, not float8_e4m3fn as fp8 checkpoints have it"
            )
        by_row = scale.float().repeat_interleave(self._block_columns, 1)[:, :k]
        return weight.float() * by_row.repeat_interleave(self._block_rows, 0)[:n]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
