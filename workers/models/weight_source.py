"""The tensors of a model directory in the order in which a decoder reads them, floats or quantized as a scheme says.

q, k, v and gate, up are fused by rows. Every name and shape is checked from the files' headers before a byte of weights
is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.models.checkpoint import TensorHeader, read_headers, read_json
from workers.models.errors import ModelError
from workers.models.gguf_blocks import GgufBlocks
from workers.models.quantize import quantize_channels, quantize_q4, quantize_q8
from workers.models.quantized import GROUP, ChannelWeight, GroupedWeight, Quantized, concat_rows, same_form
from workers.models.scheme import FLOATS, Scheme
from workers.models.spec import DecoderSpec
from workers.models.stored_form import StoredForm, stored_form
from workers.models.tensor_shapes import EMBEDDING, HEAD, expected_shapes

Matrix = Tensor | GroupedWeight | ChannelWeight  # [out, in]

_FLOAT_DTYPES = {"F16", "BF16", "F32", "F64"}

M = TypeVar("M")


@dataclass(frozen=True)
class Layer(Generic[M]):
    """One layer; M is the type of its matrices, [out, in]. Biases are [out]."""

    input_norm: Tensor  # [hidden]
    qkv: M  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    output: M  # [hidden, num_heads * head_dim]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: M  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: M  # [hidden, intermediate]
    down_bias: Tensor | None


class WeightSource:
    """Float tensors come as the files hold them (dtype, on the CPU) and may be views of a mapped file."""

    def __init__(self, path: Path, spec: DecoderSpec, scheme: Scheme = FLOATS) -> None:
        """Raises ModelError naming the missing, unexpected or wrongly shaped tensors."""
        self.spec, self.scheme = spec, scheme
        self._headers = read_headers(path)
        self._shapes = expected_shapes(spec)
        self._form = stored_form(read_json(path / "config.json"))
        self._quantized = _quantized_modules(self._headers, self._shapes, self._form)
        _check(self._headers, spec, self._shapes, self._quantized, self._form)
        kept = scheme.name in ("stored", "int4") and GgufBlocks.are_in(path)
        self._blocks = GgufBlocks(path) if kept else None
        self._open: dict[Path, Any] = {}

    def embedding(self) -> Tensor | None:
        """[vocab, hidden]; None where it is tied: then its rows are the head's."""
        return None if self.spec.tied_embeddings else self._tensor(EMBEDDING + ".weight")

    def layers(self) -> Iterator[Layer[Matrix]]:
        for layer in range(self.spec.num_layers):
            yield self._layer(f"model.layers.{layer}.")

    def final_norm(self) -> Tensor:
        """[hidden]."""
        return self._tensor("model.norm.weight")

    def head(self) -> Matrix:
        """[vocab, hidden]."""
        return self._matrix(EMBEDDING if self.spec.tied_embeddings else HEAD, head=True)

    def _layer(self, prefix: str) -> Layer[Matrix]:
        spec = self.spec
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [attention + f"{part}_proj" for part in "qkv"]
        gate_up = [mlp + "gate_proj", mlp + "up_proj"]
        return Layer(
            input_norm=self._tensor(prefix + "input_layernorm.weight"),
            qkv=self._matrix(*qkv),
            qkv_bias=self._bias(*qkv) if spec.qkv_bias else None,
            q_norm=self._tensor(attention + "q_norm.weight") if spec.qk_norm else None,
            k_norm=self._tensor(attention + "k_norm.weight") if spec.qk_norm else None,
            output=self._matrix(attention + "o_proj"),
            output_bias=self._bias(attention + "o_proj") if spec.output_bias else None,
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=self._matrix(*gate_up),
            gate_up_bias=self._bias(*gate_up) if spec.mlp_bias else None,
            down=self._matrix(mlp + "down_proj"),
            down_bias=self._bias(mlp + "down_proj") if spec.mlp_bias else None,
        )

    def _bias(self, *modules: str) -> Tensor:
        return torch.cat([self._tensor(module + ".bias") for module in modules])

    def _matrix(self, *modules: str, head: bool = False) -> Matrix:
        """`modules` below each other, in the form of the scheme."""
        parts = [self._stored(module) for module in modules]
        if self.scheme.name == "none":
            return _floats(parts)
        if self.scheme.name == "int8":
            if all(isinstance(part, ChannelWeight) for part in parts):
                return _stacked(parts)
            # A scale for each output goes with one scale for each row of activations, and those have outliers: KL to
            # float32 0.039 on SmolLM2, 0.004 with a scale for each 32 inputs on both sides (docs/quantization.md).
            values = _floats(parts)
            return quantize_channels(values) if values.shape[1] % GROUP else quantize_q8(values)
        if self.scheme.name == "int4":
            form = "q8" if head else "q4"
            if all(isinstance(part, GroupedWeight) and part.format == form for part in parts):
                return _stacked(parts)
            return (quantize_q8 if head else quantize_q4)(_floats(parts))
        if same_form(parts):
            return _stacked(parts)
        # Fused of different forms, or of a GGUF type that the kernels do not hold (Q6_K, say): eight bits are as good
        # as what was stored.
        was_quantized = any(not isinstance(part, Tensor) for part in parts) or (
            self._blocks is not None and any(self._blocks.was_quantized(m + ".weight") for m in modules)
        )
        return (
            quantize_q8(_floats(parts)) if was_quantized and not parts[0].shape[1] % GROUP else _floats(parts)
        )

    def _stored(self, module: str) -> Matrix:
        name = module + ".weight"
        if self._blocks is not None and name in self._blocks:
            return self._blocks.read(name)
        if module not in self._quantized:
            return self._tensor(name)
        assert self._form is not None
        n, k = self._shapes[name]
        return self._form.read(module, n, k, lambda end: self._optional(f"{module}.{end}"))

    def _optional(self, name: str) -> Tensor | None:
        own_bias = name.endswith(".bias") and name in self._shapes  # read apart, as for float matrices
        return self._tensor(name) if name in self._headers and not own_bias else None

    def _tensor(self, name: str) -> Tensor:
        file = self._headers[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            value: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {name} cannot be read ({error}); fetch the model again") from error
        return value


def to_float(matrix: Matrix) -> Tensor:
    """The values of `matrix`: as they are, or float32."""
    return matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix.dequantize())


def _floats(parts: list[Matrix]) -> Tensor:
    return to_float(parts[0]) if len(parts) == 1 else torch.cat([to_float(part) for part in parts])


def _stacked(parts: list[Matrix]) -> Quantized:
    return concat_rows([part for part in parts if not isinstance(part, Tensor)])


def _quantized_modules(
    headers: dict[str, TensorHeader], shapes: dict[str, tuple[int, ...]], form: StoredForm | None
) -> set[str]:
    """The layers that `form` stores. The embedding is looked up by rows and stays as it is in every format."""
    if form is None:
        return set()
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2} - {
        EMBEDDING
    }
    return {module for module in matrices if f"{module}.{form.marker}" in headers}


def _check(
    headers: dict[str, TensorHeader],
    spec: DecoderSpec,
    shapes: dict[str, tuple[int, ...]],
    quantized: set[str],
    form: StoredForm | None,
) -> None:
    floats = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in quantized}
    wanted = dict(floats)
    ignored = {name for name in headers if name.endswith("rotary_emb.inv_freq")}  # buffers of old checkpoints
    if form is not None:
        for module in sorted(quantized):
            n, k = shapes[module + ".weight"]
            wanted |= {f"{module}.{end}": shape for end, shape in form.shapes(n, k).items()}
            ignored |= {f"{module}.{end}" for end in form.optional}
    if spec.tied_embeddings:
        ignored.add("lm_head.weight")
    _refuse("misses", wanted.keys() - headers.keys(), spec)
    _refuse("has unexpected", headers.keys() - wanted.keys() - ignored, spec)
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if headers[name].shape != shape
    ]
    _refuse("has wrongly shaped", wrong, spec)
    dtypes = [
        f"{name} is {headers[name].dtype}" for name in floats if headers[name].dtype not in _FLOAT_DTYPES
    ]
    _refuse("has quantized", dtypes, spec)


def _refuse(what: str, names: Iterable[str], spec: DecoderSpec) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ModelError(f"the {spec.architecture} checkpoint {what} tensors: {'; '.join(listed[:8])}{more}")
