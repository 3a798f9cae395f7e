"""Safetensors into the tensors a decoder wants: q, k, v and gate, up fused, in one dtype on one device.

Every name and shape is checked from the files' headers before a byte of weights is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.models.errors import ModelError
from workers.models.spec import DecoderSpec

INDEX_NAME = "model.safetensors.index.json"
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
    files = weight_files(path)
    shapes = expected_shapes(spec)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(stack, files, shapes, spec)
        read = _Reader(checkpoint, dtype, device)
        embedding = read("model.embed_tokens.weight")
        head = embedding if spec.tied_embeddings else read("lm_head.weight")
        final_norm = read("model.norm.weight")
    return DecoderWeights(embedding, _Layers(files, shapes, spec, dtype, device), final_norm, head)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ModelError when there are none or one is missing."""
    single, index = path / "model.safetensors", path / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path / str(name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from error
        for file in files:
            # A shard's name is the model's, not ours: it must not lead out of the directory.
            if file.parent != path:
                raise ModelError(f"{index} names {file.name!r} outside its directory")
            if not file.is_file():
                raise ModelError(f"{file} is named by {INDEX_NAME} but is not there; fetch the model again")
        return files
    if single.is_file():
        return [single]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            f"{path} holds pickled weights only; pickles can run code and are never loaded. "
            "Only safetensors and GGUF are read: convert the model with safetensors"
        )
    raise ModelError(f"{path} holds no weights: only safetensors and GGUF are read")


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


class _Checkpoint:
    """Open safetensors files whose headers agree with what is expected."""

    def __init__(
        self, stack: ExitStack, files: list[Path], shapes: dict[str, tuple[int, ...]], spec: DecoderSpec
    ) -> None:
        self._holder: dict[str, Any] = {}
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                handle: Any = stack.enter_context(safe_open(file, framework="pt"))
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    piece = handle.get_slice(name)
                    if piece.get_dtype() not in _FLOATS and name in shapes:
                        raise ModelError(
                            f"{file.name}: {name} is {piece.get_dtype()}, quantized weights are not read"
                        )
                    found[name] = tuple(piece.get_shape())
                    self._holder[name] = handle
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file} is not a whole safetensors file ({error}); fetch it again"
                ) from error
        ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
        if spec.tied_embeddings:
            ignored.add("lm_head.weight")
        _refuse("misses", shapes.keys() - found.keys(), spec)
        _refuse("has unexpected", found.keys() - shapes.keys() - ignored, spec)
        wrong = [
            f"{name} is {found[name]}, not {shape}" for name, shape in shapes.items() if found[name] != shape
        ]
        _refuse("has wrongly shaped", wrong, spec)

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self._holder[name].get_tensor(name)
        return value


def _refuse(what: str, names: Iterable[str], spec: DecoderSpec) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ModelError(f"the {spec.architecture} checkpoint {what} tensors: {'; '.join(listed[:8])}{more}")


class _Reader:
    """Tensors by name, several of them stacked by rows, at the wanted dtype on the wanted device."""

    def __init__(self, checkpoint: _Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device

    def __call__(self, *names: str) -> Tensor:
        parts = [self._checkpoint.tensor(name) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # copy: without it the tensor would keep the whole file mapped, and change with the file.
        return whole.to(self._device, self._dtype, copy=len(parts) == 1)


class _Layers:
    """Layers read from the files as they are asked for."""

    def __init__(
        self,
        files: list[Path],
        shapes: dict[str, tuple[int, ...]],
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._files, self._shapes, self._spec, self._dtype, self._device = files, shapes, spec, dtype, device

    def __len__(self) -> int:
        return self._spec.num_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        with ExitStack() as stack:
            read = _Reader(
                _Checkpoint(stack, self._files, self._shapes, self._spec), self._dtype, self._device
            )
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
