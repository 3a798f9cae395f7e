"""A model directory as the tensors that the torch decoder wants: in one dtype on one device, quantized or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.models.scheme import FLOATS, Scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import Layer, Matrix, WeightSource, to_float

LayerWeights = Layer[Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """`layers` may be lazy and read once, so that a decoder that repacks them never holds the model twice."""

    embedding: Tensor  # [vocab, hidden]
    layers: Iterable[LayerWeights]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself when tied


def load_weights(
    path: Path, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, scheme: Scheme = FLOATS
) -> DecoderWeights:
    """`path` is a directory. Raises ModelError naming the missing, unexpected or wrongly shaped tensors.

    Under another scheme than FLOATS the weights are those of the quantized model, at the memory of the float one: the
    native kernels' oracle, and how a quantized checkpoint runs where there are no native kernels.
    """
    source = WeightSource(path, spec, scheme)
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

    def __call__(self, matrix: Matrix) -> Tensor:
        # copy: without it the tensor would keep the whole file mapped, and change with the file.
        return to_float(matrix).to(self._device, self._dtype, copy=True)

    def optional(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self(tensor)


class _Layers:
    """Layers read from the files as they are asked for."""

    def __init__(self, source: WeightSource, place: _Place) -> None:
        self._source, self._place = source, place

    def __len__(self) -> int:
        return self._source.spec.num_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        place = self._place
        for layer in self._source.layers():
            yield Layer(
                input_norm=place(layer.input_norm),
                qkv=place(layer.qkv),
                qkv_bias=place.optional(layer.qkv_bias),
                q_norm=place.optional(layer.q_norm),
                k_norm=place.optional(layer.k_norm),
                output=place(layer.output),
                output_bias=place.optional(layer.output_bias),
                mlp_norm=place(layer.mlp_norm),
                gate_up=place(layer.gate_up),
                gate_up_bias=place.optional(layer.gate_up_bias),
                down=place(layer.down),
                down_bias=place.optional(layer.down_bias),
            )
