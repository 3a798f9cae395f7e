"""A model directory as the tensors that the torch decoder wants: in one dtype on one device, quantized or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.models.layer_weights import Layer
from workers.models.matrix_form import Matrix, to_float
from workers.models.scheme import FLOATS, Scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource
from workers.parallel.shard import WHOLE, Shard

LayerWeights = Layer[Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """`layers` may be lazy and read once, so that a decoder that repacks them never holds the model twice."""

    embedding: Tensor  # [vocab, hidden], of a shard its rows
    layers: Iterable[LayerWeights]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself when tied


def load_weights(
    path: Path,
    spec: DecoderSpec,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme = FLOATS,
    shard: Shard = WHOLE,
) -> DecoderWeights:
    """`path` is a directory, `spec` the whole model's, `shard` what is read of it.

    Raises ModelError naming the missing, unexpected or wrongly shaped tensors.

    Under another scheme than FLOATS the weights are those of the quantized model, at the memory of the float one: the
    native kernels' oracle, and how a quantized checkpoint runs where there are no native kernels.
    """
    source = WeightSource(path, spec, scheme, shard)
    place = _Place(dtype, device)
    head = place(source.head())
    embedding = source.embedding()
    return DecoderWeights(
        embedding=head if embedding is None else place(embedding),
        layers=_Layers(source, place),
        final_norm=place(source.final_norm()),
        head=head,
    )


class _Place:
    """Copies to the dtype and device that were asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def __call__(self, matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
        # copy: without it the tensor would keep the whole file mapped, and change with the file.
        return to_float(matrix).to(self._device, dtype or self._dtype, copy=True)

    def all_of(self, part: Any) -> Any:
        """A dataclass of weights with every matrix and tensor in it in place."""
        return replace(part, **{field.name: self._field(part, field.name) for field in fields(part)})

    def _field(self, part: Any, name: str) -> Any:
        value = getattr(part, name)
        if value is None:
            return None
        if name == "expert":
            return lambda logical: self.all_of(value(logical))
        if name in ("attention", "mlp", "shared"):
            return self.all_of(value)
        # Rounding the router would send tokens to other experts.
        return self(value, torch.float32 if name in ("router", "router_bias", "correction_bias") else None)


class _Layers:
    """Layers read from the files as they are asked for."""

    def __init__(self, source: WeightSource, place: _Place) -> None:
        self._source, self._place = source, place

    def __len__(self) -> int:
        return self._source.spec.num_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        for layer in self._source.layers():
            yield self._place.all_of(layer)
