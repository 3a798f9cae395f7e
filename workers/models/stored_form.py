"""Quantized safetensors checkpoints: which are read, and what a reader of one must say. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from workers.models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.quantized import Quantized

METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4")


class StoredForm(Protocol):
    """How one checkpoint stores a quantized matrix [n, k] of the linear layer `module`."""

    marker: str  # a layer is quantized where the tensor `{module}.{marker}` is there
    optional: tuple[str, ...]  # further tensors of a layer that may be there

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer that must be there, by the end of their name. Raises ModelError for sizes that the
        format cannot have."""

    def read(self, module: str, n: int, k: int, tensor: Callable[[str], Tensor | None]) -> Quantized | Tensor:
        """`tensor`: the layer's tensor by the end of its name, None where it is absent. Raises ModelError."""


def stored_form(config: Mapping[str, Any]) -> StoredForm | None:
    """The form that config.json's quantization_config describes, None where there is none.

    Raises ModelError for what is not read, naming what came and what is allowed.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: quantization_config must be an object, not {given!r}")
    method = given.get("quant_method")
    if method == "gptq":
        from workers.models.gptq import GptqForm

        return GptqForm(given)
    if method == "awq":
        from workers.models.awq import AwqForm

        return AwqForm(given)
    if method == "compressed-tensors":
        from workers.models.compressed_tensors import compressed_form

        return compressed_form(given)
    if method == "fp8":
        from workers.models.fp8 import fp8_form

        return fp8_form(given)
    if method == "mxfp4":
        return None  # of experts only, which are read apart: see expert_form
    raise ModelError(
        f"checkpoints quantized by {method!r} are not read; {', '.join(METHODS)} and GGUF are, "
        "or use the model's unquantized weights"
    )
