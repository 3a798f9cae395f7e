"""GPTQ checkpoints: AutoGPTQ's and GPTQModel's layout, where eight or four inputs share a word.

qweight [k * bits / 32, n]          words along the inputs
qzeros  [groups, n * bits / 32]     words along the outputs; format "gptq" stores zero - 1, "gptq_v2" zero
scales  [groups, n]
g_idx   [k]                         the group of each input; with act-order (desc_act) not in order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.models.errors import ModelError
from workers.models.quantized import GroupedWeight, Quantized
from workers.models.stored_integers import floats, groups_of, need, neutral, one_of, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

_GROUP_SIZES = (32, 64, 128, -1)


class GptqForm:
    """See `stored_form.StoredForm`."""

    marker = "qweight"
    optional: tuple[str, ...] = ("g_idx", "bias")  # old AutoGPTQ writes a bias of zeros for every layer

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bits: int = one_of(config, "bits", (4, 8))
        self._group_size: int = one_of(config, "group_size", _GROUP_SIZES)
        version = one_of(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self._stored_minus = 1 if version == "gptq" else 0
        if config.get("dynamic"):
            raise ModelError("config.json: GPTQ with settings by layer (dynamic) is not read")

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        groups, per_word = groups_of(self._group_size, k, self._bits), 32 // self._bits
        if n % per_word:
            raise ModelError(f"GPTQ packs {per_word} outputs in a word; {n} is no multiple of it")
        return {
            "qweight": (k // per_word, n),
            "qzeros": (groups, n // per_word),
            "scales": (groups, n),
        }

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Quantized:
        bits, groups = self._bits, groups_of(self._group_size, k, self._bits)
        order = _order(module, tensor("g_idx"), k, groups)
        bias = tensor("bias")
        if bias is not None and bias.any():
            raise ModelError(f"{module} has a bias, which its architecture does not have")
        q = unpack_words(need(tensor("qweight")).T.contiguous(), bits)
        zero = unpack_words(need(tensor("qzeros")), bits)
        # Zero 0 is stored as -1, all bits set: modulo 2^bits it comes back.
        zero = (zero + np.uint8(self._stored_minus)) & np.uint8(2**bits - 1)
        if order is not None:
            q = q[:, order]
        found = neutral(module, q, floats(need(tensor("scales"))).T, zero.T, bits)
        # Scales of whole rows are those of any order, which is then the model's.
        return replace(found, order=order) if isinstance(found, GroupedWeight) else found


def _order(module: str, g_idx: Tensor | None, k: int, groups: int) -> NDArray[np.int32] | None:
    """The inputs, those of a group together; None where they are so anyway. Raises ModelError."""
    if g_idx is None or groups == 1:
        return None
    given, wanted = g_idx.numpy(), np.arange(k) // (k // groups)
    if np.array_equal(given, wanted):
        return None
    order = np.argsort(given, kind="stable").astype(np.int32)
    if not np.array_equal(given[order], wanted):
        raise ModelError(f"{module}.g_idx does not put {k // groups} inputs into each of {groups} groups")
    return order
