"""A model directory as the tensors that the torch decoder wants: in one dtype on one device, quantized or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.quantized_matrix import Weight
from workers.models.device_matrix import on_device
from workers.models.layer_weights import Layer, Mlp
from workers.models.matrix_form import Matrix, MatrixForm, to_float
from workers.models.quantize import quantize_q8
from workers.models.quantized import GroupedWeight
from workers.models.scheme import FLOATS, Scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource
from workers.parallel.shard import WHOLE, Shard

LayerWeights = Layer[Weight]

# Matrices that may stay quantized: those that multiply rows of activations and nothing else.
_PRODUCTS = ("qkv", "output", "gate_up", "down", "q_up")


@dataclass(frozen=True)
class DecoderWeights:
    """`layers` may be lazy and read once, so that a decoder that repacks them never holds the model twice."""

    embedding: Tensor  # [vocab, hidden], of a shard its rows
    layers: Iterable[LayerWeights]
    final_norm: Tensor  # [hidden]
    head: Weight  # [vocab, hidden]; the embedding itself when tied, unless it is quantized


def load_weights(
    path: Path,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme = FLOATS,
    shard: Shard = WHOLE,
    *,
    keep_quantized: bool = False,
) -> DecoderWeights:
    """`path` is a directory, `spec` the whole model's, `shard` what is read of it.

    Raises ModelError naming the missing, unexpected or wrongly shaped tensors.

    keep_quantized: projections and the head stay in the bits that the scheme has, and are multiplied with as they are.
    Without it the weights are those of the quantized model at the memory of the float one: the oracle of kernels, and
    how a quantized checkpoint runs where there are none. Embeddings, norms, routers and what latent attention folds
    into its queries are floats in any case.
    """
    on_gpu = device.type == "cuda"
    form = MatrixForm(scheme, every_form=keep_quantized, quantize_on=device if on_gpu else None)
    source = WeightSource(path, spec, scheme, shard, form)
    place = _Place(dtype, device, keep_quantized)
    read = source.head()
    head = place.product(read)
    own = source.embedding()
    if own is None and isinstance(head, Tensor):
        return DecoderWeights(head, _Layers(source, place), place(source.final_norm()), head)
    embedding = place(read if own is None else own)
    return DecoderWeights(embedding, _Layers(source, place), place(source.final_norm()), head)


class _Place:
    """Copies to the dtype and device that were asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device, keep_quantized: bool = False) -> None:
        self._dtype, self._device, self._keep_quantized = dtype, device, keep_quantized

    def __call__(self, matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
        # copy: without it the tensor would keep the whole file mapped, and change with the file.
        return to_float(matrix).to(self._device, dtype or self._dtype, copy=True)

    def product(self, matrix: Matrix) -> Weight:
        if self._keep_quantized and not isinstance(matrix, Tensor):
            return on_device(matrix, self._dtype, self._device)
        return self(matrix)

    def all_of(self, part: Any) -> Any:
        """A dataclass of weights with every matrix and tensor in it in place."""
        return replace(part, **{field.name: self._field(part, field.name) for field in fields(part)})

    def _field(self, part: Any, name: str) -> Any:
        value = getattr(part, name)
        if value is None:
            return None
        if name == "expert":
            return lambda logical: self.all_of(_inputs_in_order(value(logical)))
        if name in ("attention", "mlp", "shared"):
            return self.all_of(value)
        if name in _PRODUCTS:
            return self.product(value)
        # Rounding the router would send tokens to other experts.
        return self(value, torch.float32 if name in ("router", "router_bias", "correction_bias") else None)


def _inputs_in_order(expert: Mlp[Matrix]) -> Mlp[Matrix]:
    """Matrices whose inputs are scattered in eight bits, in the model's order: experts' kernels take no other."""

    def ordered(matrix: Matrix) -> Matrix:
        scattered = isinstance(matrix, GroupedWeight) and matrix.order is not None
        return quantize_q8(to_float(matrix)) if scattered else matrix

    return replace(expert, gate_up=ordered(expert.gate_up), down=ordered(expert.down))


class _Layers:
    """Layers read from the files as they are asked for."""

    def __init__(self, source: WeightSource, place: _Place) -> None:
        self._source, self._place = source, place

    def __len__(self) -> int:
        return self._source.spec.num_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        for layer in self._source.layers():
            yield self._place.all_of(layer)
