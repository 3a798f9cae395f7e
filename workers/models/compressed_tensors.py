"""compressed-tensors checkpoints: int4 and int8 weights, by groups or by output channel, and float8.

    pack-quantized:  weight_packed [n, k * bits / 32] int32, words along the inputs, q + 2^(bits - 1) in each field;
                     weight_zero_point [n * bits / 32, groups], packed alike along the outputs (asymmetric only);
                     weight_shape, the numbers n and k
    int-quantized:   weight [n, k] int8
    both:            weight_scale [n, groups]
    float-quantized: see fp8

Activations that the checkpoint wants rounded are left to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.models.errors import ModelError
from workers.models.fp8 import BlockFp8Form, PlainFp8Form
from workers.models.quantized import Q8_OFFSET, Quantized
from workers.models.stored_form import StoredForm
from workers.models.stored_integers import floats, groups_of, need, neutral, one_of, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


def compressed_form(config: Mapping[str, Any]) -> StoredForm:
    """Raises ModelError for what is not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ModelError(
            f"config.json: compressed-tensors with {len(groups or ())} config_groups is not read; with one it is"
        )
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError("config.json: the config_group of compressed-tensors has no weights")
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ModelError(f"config.json: compressed-tensors with a {key} is not read")
    activations = group.get("input_activations")
    # A group may name a format of its own.
    format = one_of({"format": group.get("format") or config.get("format")}, "format", _FORMATS)
    if format == "float-quantized":
        return _float_form(weights)
    if activations and not (activations.get("dynamic") is True and activations.get("type") == "int"):
        raise ModelError(
            "config.json: compressed-tensors of integers with static or float input_activations is not read"
        )
    one_of(weights, "type", ("int",), "int")
    one_of(weights, "actorder", (None, False, "static", "weight"))  # these leave the inputs in their order
    strategy = one_of(weights, "strategy", ("group", "channel"))
    size = one_of(weights, "group_size", (32, 64, 128)) if strategy == "group" else -1
    if format == "int-quantized":
        one_of(weights, "num_bits", (8,))
        one_of(weights, "symmetric", (True,), True)
        return IntForm(size)
    return PackedForm(
        one_of(weights, "num_bits", (4, 8)), size, one_of(weights, "symmetric", (True, False), True)
    )


def _float_form(weights: Mapping[str, Any]) -> StoredForm:
    one_of(weights, "type", ("float",))
    one_of(weights, "num_bits", (8,))
    one_of(weights, "symmetric", (True,), True)
    strategy = one_of(weights, "strategy", ("tensor", "channel", "block"))
    if strategy == "block":
        return BlockFp8Form(weights.get("block_structure"), "weight_scale")
    return PlainFp8Form()


class PackedForm:
    """pack-quantized. See `stored_form.StoredForm`."""

    marker = "weight_packed"
    optional: tuple[str, ...] = ("weight_shape",)

    def __init__(self, bits: int, group_size: int, symmetric: bool) -> None:
        self._bits, self._group_size, self._symmetric = bits, group_size, symmetric

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        groups, per_word = groups_of(self._group_size, k, self._bits), 32 // self._bits
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (n, k // per_word),
            "weight_scale": (n, groups),
        }
        if not self._symmetric:
            shapes["weight_zero_point"] = (-(-n // per_word), groups)
        return shapes

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Quantized:
        q = unpack_words(need(tensor("weight_packed")), self._bits)
        scale = floats(need(tensor("weight_scale")))
        if self._symmetric:
            zero = np.full(scale.shape, 2 ** (self._bits - 1), np.uint8)
        else:
            zero = unpack_words(need(tensor("weight_zero_point")).T.contiguous(), self._bits)[:, :n].T
        return neutral(module, q, scale, zero, self._bits)


class IntForm:
    """int-quantized. See `stored_form.StoredForm`."""

    marker = "weight_scale"
    optional: tuple[str, ...] = ()

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (n, k), "weight_scale": (n, groups_of(self._group_size, k, 8))}

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Quantized:
        weight = need(tensor("weight"))
        if str(weight.dtype) != "torch.int8":
            raise ModelError(f"{module}.weight is {weight.dtype}, not int8 as the format says")
        scale = floats(need(tensor("weight_scale")))
        q = weight.numpy().view(np.uint8) + np.uint8(Q8_OFFSET)  # modulo 256
        return neutral(module, q, scale, np.full(scale.shape, Q8_OFFSET, np.uint8), 8)
