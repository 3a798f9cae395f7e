"""A decoder's weights as the native kernels read them: the one place that knows both the model and the packed layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu.layout import gate_up_rows, qkv_rows
from kernels.cpu.library import Library
from kernels.cpu.decoder import PackedLayer, PackedModel
from kernels.cpu.structures import Format
from workers.models.cache import default_cache_dir
from workers.models.catalog import PreparedModel
from workers.models.layer_weights import GroupedAttention, Mlp
from workers.models.packed_file import Memory, PackedFile
from workers.models.packed_weights import PackKey, ToPack, load_packed
from workers.models.rope import inverse_frequencies
from workers.models.scheme import choose_scheme, weights_fingerprint
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource

FLOAT_FORMATS = {"bfloat16": Format.BF16, "float32": Format.F32}


@dataclass(frozen=True)
class OpenedModel:
    model: PackedModel
    fingerprint: str  # of the values that are computed with: prepared model and scheme
    scheme: str  # see workers/models/scheme.py


def open_packed_model(
    model: PreparedModel,
    spec: DecoderSpec,
    quantization: str,
    dtype: str,
    library: Library,
    *,
    threads: int = 1,
    memory: Memory = "mmap",
) -> OpenedModel:
    """Map the packed weights of `model`, after packing them where no worker of this host has yet. Raises ModelError.

    `quantization` as in EngineConfig; `dtype` ("bfloat16", "float32") of what is not quantized.
    """
    scheme = choose_scheme(quantization, model.path)
    fingerprint = weights_fingerprint(model.fingerprint, scheme)
    packed = load_packed(
        default_cache_dir(),
        PackKey(fingerprint, FLOAT_FORMATS[dtype]),
        lambda: _entries(WeightSource(model.path, spec, scheme), spec),
        library,
        threads=threads,
        memory=memory,
    )
    return OpenedModel(_assembled(packed, spec, model.max_model_len), fingerprint, scheme.name)


def _entries(source: WeightSource, spec: DecoderSpec) -> Iterator[ToPack]:
    """In the order in which a step reads them."""
    embedding = source.embedding()
    if embedding is not None:
        yield ToPack("embedding", embedding, plain=True)
    heads = qkv_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    halves = gate_up_rows(spec.intermediate_size)
    for index, layer in enumerate(source.layers()):
        prefix = f"{index}."
        yield ToPack(prefix + "input_norm", layer.input_norm, plain=True)
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, GroupedAttention), "latent attention is not native"
        assert isinstance(mlp, Mlp), "experts are not native"
        yield ToPack(prefix + "qkv", attention.qkv, heads, attention.qkv_bias)
        if attention.q_norm is not None and attention.k_norm is not None:
            yield ToPack(prefix + "q_norm", attention.q_norm, plain=True)
            yield ToPack(prefix + "k_norm", attention.k_norm, plain=True)
        yield ToPack(prefix + "output", attention.output, None, attention.output_bias)
        yield ToPack(prefix + "mlp_norm", layer.mlp_norm, plain=True)
        yield ToPack(prefix + "gate_up", mlp.gate_up, halves, mlp.gate_up_bias)
        yield ToPack(prefix + "down", mlp.down, None, mlp.down_bias)
    yield ToPack("final_norm", source.final_norm(), plain=True)
    yield ToPack("head", source.head())


def _assembled(packed: PackedFile, spec: DecoderSpec, max_positions: int) -> PackedModel:
    cos, sin = _angles(spec, max_positions)
    return PackedModel(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        vocab=spec.vocab_size,
        norm_eps=spec.norm_eps,
        scale=spec.scale,
        embedding=packed.arrays.get("embedding"),
        layers=[_layer(packed, spec, index) for index in range(spec.num_layers)],
        final_norm=packed.arrays["final_norm"],
        cos=cos,
        sin=sin,
        head=packed.matrices["head"],
    )


def _layer(packed: PackedFile, spec: DecoderSpec, index: int) -> PackedLayer:
    prefix = f"{index}."
    return PackedLayer(
        input_norm=packed.arrays[prefix + "input_norm"],
        q_norm=packed.arrays.get(prefix + "q_norm"),
        k_norm=packed.arrays.get(prefix + "k_norm"),
        mlp_norm=packed.arrays[prefix + "mlp_norm"],
        qkv=packed.matrices[prefix + "qkv"],
        output=packed.matrices[prefix + "output"],
        gate_up=packed.matrices[prefix + "gate_up"],
        down=packed.matrices[prefix + "down"],
        window=spec.windows[index],
    )


def _angles(spec: DecoderSpec, max_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos, sin [max_positions, head_dim / 2], computed in float32 as transformers does."""
    frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()
