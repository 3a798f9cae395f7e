"""Safetensors into the tensors a decoder wants: q, k, v and gate, up fused, in one dtype on one device.

Every name and shape is checked from the files' headers before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.models.checkpoint import TensorHeader, read_headers
from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec

_FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class LayerWeights:
    """Projections are [out, in], biases [out]."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    output: Tensor  # [hidden, num_heads * head_dim]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """`layers` may be lazy and read once, so that a decoder that repacks them never holds the model twice."""

    embedding: Tensor  # [vocab, hidden]
    layers: Iterable[LayerWeights]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself when tied


def load_weights(path: Path, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """`path` is a directory. Raises ModelError naming the missing, unexpected or wrongly shaped tensors."""
    headers = read_headers(path)
    _check(headers, spec)
    with ExitStack() as stack:
        read = _Reader(stack, headers, dtype, device)
        embedding = read("model.embed_tokens.weight")
        head = embedding if spec.tied_embeddings else read("lm_head.weight")
        final_norm = read("model.norm.weight")
    return DecoderWeights(embedding, _Layers(headers, spec, dtype, device), final_norm, head)


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    projections = [
        ("self_attn.q_proj", q_rows, hidden, spec.qkv_bias),
        ("self_attn.k_proj", kv_rows, hidden, spec.qkv_bias),
        ("self_attn.v_proj", kv_rows, hidden, spec.qkv_bias),
        ("self_attn.o_proj", hidden, q_rows, spec.output_bias),
        ("mlp.gate_proj", inner, hidden, spec.mlp_bias),
        ("mlp.up_proj", inner, hidden, spec.mlp_bias),
        ("mlp.down_proj", hidden, inner, spec.mlp_bias),
    ]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if spec.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (spec.head_dim,)
        for name, rows, columns, bias in projections:
            shapes[prefix + name + ".weight"] = (rows, columns)
            if bias:
                shapes[prefix + name + ".bias"] = (rows,)
    return shapes


def _check(headers: dict[str, TensorHeader], spec: DecoderSpec) -> None:
    shapes = expected_shapes(spec)
    ignored = {name for name in headers if name.endswith("rotary_emb.inv_freq")}  # buffers of old checkpoints
    if spec.tied_embeddings:
        ignored.add("lm_head.weight")
    _refuse("misses", shapes.keys() - headers.keys(), spec)
    _refuse("has unexpected", headers.keys() - shapes.keys() - ignored, spec)
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if headers[name].shape != shape
    ]
    _refuse("has wrongly shaped", wrong, spec)
    quantized = [f"{name} is {headers[name].dtype}" for name in shapes if headers[name].dtype not in _FLOATS]
    _refuse("has quantized", quantized, spec)


def _refuse(what: str, names: Iterable[str], spec: DecoderSpec) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ModelError(f"the {spec.architecture} checkpoint {what} tensors: {'; '.join(listed[:8])}{more}")


class _Reader:
    """Tensors by name, several of them stacked by rows, at the wanted dtype on the wanted device."""

    def __init__(
        self,
        stack: ExitStack,
        headers: dict[str, TensorHeader],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Files are opened when first asked for and closed by `stack`."""
        self._stack, self._headers, self._dtype, self._device = stack, headers, dtype, device
        self._open: dict[Path, Any] = {}

    def __call__(self, *names: str) -> Tensor:
        parts = [self._tensor(name) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # copy: without it the tensor would keep the whole file mapped, and change with the file.
        return whole.to(self._device, self._dtype, copy=len(parts) == 1)

    def _tensor(self, name: str) -> Tensor:
        file = self._headers[name].file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            value: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {name} cannot be read ({error}); fetch the model again") from error
        return value


class _Layers:
    """Layers read from the files as they are asked for."""

    def __init__(
        self, headers: dict[str, TensorHeader], spec: DecoderSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._headers, self._spec, self._dtype, self._device = headers, spec, dtype, device

    def __len__(self) -> int:
        return self._spec.num_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        with ExitStack() as stack:
            read = _Reader(stack, self._headers, self._dtype, self._device)
            for layer in range(self._spec.num_layers):
                yield self._layer(read, f"model.layers.{layer}.")

    def _layer(self, read: _Reader, prefix: str) -> LayerWeights:
        spec = self._spec
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [attention + f"{part}_proj" for part in "qkv"]
        gate_up = [mlp + "gate_proj", mlp + "up_proj"]
        return LayerWeights(
            input_norm=read(prefix + "input_layernorm.weight"),
            qkv=read(*(name + ".weight" for name in qkv)),
            qkv_bias=read(*(name + ".bias" for name in qkv)) if spec.qkv_bias else None,
            q_norm=read(attention + "q_norm.weight") if spec.qk_norm else None,
            k_norm=read(attention + "k_norm.weight") if spec.qk_norm else None,
            output=read(attention + "o_proj.weight"),
            output_bias=read(attention + "o_proj.bias") if spec.output_bias else None,
            mlp_norm=read(prefix + "post_attention_layernorm.weight"),
            gate_up=read(*(name + ".weight" for name in gate_up)),
            gate_up_bias=read(*(name + ".bias" for name in gate_up)) if spec.mlp_bias else None,
            down=read(mlp + "down_proj.weight"),
            down_bias=read(mlp + "down_proj.bias") if spec.mlp_bias else None,
        )
