"""AWQ checkpoints: the "gemm" layout, 4 bits, with words along the outputs.

qweight [k, n / 8]          the outputs of a word are interleaved: even ones first
qzeros  [groups, n / 8]     the same
scales  [groups, n]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.models.errors import ModelError
from workers.models.quantized import Quantized
from workers.models.stored_integers import floats, groups_of, need, neutral, one_of, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

_BITS, _PER_WORD = 4, 8
_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF_OUTPUT = [_OUTPUT_OF_NIBBLE.index(output) for output in range(_PER_WORD)]


class AwqForm:
    """See `stored_form.StoredForm`."""

    marker = "qweight"
    optional: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        one_of(config, "w_bit" if "w_bit" in config else "bits", (_BITS,))
        self._group_size: int = one_of(
            config, "q_group_size" if "q_group_size" in config else "group_size", (32, 64, 128, -1)
        )
        version = config.get("version", config.get("format", "gemm"))
        one_of({"version": str(version).lower()}, "version", ("gemm",))
        one_of(config, "zero_point", (True,), True)

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        groups = groups_of(self._group_size, k, _BITS)
        if n % _PER_WORD:
            raise ModelError(f"AWQ packs {_PER_WORD} outputs in a word; {n} is no multiple of it")
        return {"qweight": (k, n // _PER_WORD), "qzeros": (groups, n // _PER_WORD), "scales": (groups, n)}

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Quantized:
        q, zero = _outputs(need(tensor("qweight"))), _outputs(need(tensor("qzeros")))
        return neutral(module, q, floats(need(tensor("scales"))).T, zero, _BITS)


def _outputs(words: Tensor) -> NDArray[np.uint8]:
    """[rows, n / 8] -> [n, rows]."""
    values = unpack_words(words, _BITS).reshape(words.shape[0], -1, _PER_WORD)
    return np.ascontiguousarray(values[:, :, _NIBBLE_OF_OUTPUT].reshape(words.shape[0], -1).T)
