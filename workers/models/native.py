"""A decoder's weights as the native kernels read them: the one place that knows both the model and the packed layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cpu.layout import gate_up_rows, qkv_rows
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedExpert, PackedLayer, PackedModel, PackedMoe
from kernels.cpu.structures import Format
from workers.models.cache import default_cache_dir
from workers.models.catalog import PreparedModel
from workers.models.errors import ModelError, NotHere
from workers.models.layer_weights import GroupedAttention, Mlp, SparseMlp
from workers.models.matrix_form import Matrix
from workers.models.moe import routing_of
from workers.models.packed_file import Memory, PackedFile
from workers.models.packed_weights import EXPERTS, WEIGHTS, PackKey, ToPack, load_packed
from workers.models.rope import inverse_frequencies
from workers.models.scheme import choose_scheme, weights_fingerprint
from workers.models.spec import DecoderSpec, MoeSpec
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
    all_experts: bool = True,
) -> OpenedModel:
    """Map the packed weights of `model`, after packing them where no worker of this host has yet. Raises ModelError.

    `quantization` as in EngineConfig; `dtype` ("bfloat16", "float32") of what is not quantized. Without `all_experts`
    the pages of experts are mapped but not read: those that somebody reads take memory. NotHere: stored so that the
    native kernels cannot hold it.
    """
    scheme = choose_scheme(quantization, model.path)
    if scheme.name == "fp8":
        raise ModelError(
            "engine.quantization is fp8, which needs a GPU; native CPU kernels have stored, int8 and int4"
        )
    fingerprint = weights_fingerprint(model.fingerprint, scheme)
    packed = load_packed(
        default_cache_dir(),
        PackKey(fingerprint, FLOAT_FORMATS[dtype]),
        lambda: _entries(WeightSource(model.path, spec, scheme), spec),
        library,
        threads=threads,
        memory=memory,
        files=(WEIGHTS,) if spec.moe is None else (WEIGHTS, EXPERTS),
        lazy=() if all_experts else (EXPERTS,),
    )
    return OpenedModel(_assembled(packed, spec, model.max_model_len), fingerprint, scheme.name)


def _entries(source: WeightSource, spec: DecoderSpec) -> Iterator[ToPack]:
    """In the order in which a step reads them."""
    embedding = source.embedding()
    if embedding is not None:
        yield ToPack("embedding", embedding, plain=True)
    heads = qkv_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    for index, layer in enumerate(source.layers()):
        prefix = f"{index}."
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, GroupedAttention), "latent attention is not native"
        yield ToPack(prefix + "input_norm", layer.input_norm, plain=True)
        yield ToPack(prefix + "qkv", attention.qkv, heads, attention.qkv_bias)
        if attention.q_norm is not None and attention.k_norm is not None:
            yield ToPack(prefix + "q_norm", attention.q_norm, plain=True)
            yield ToPack(prefix + "k_norm", attention.k_norm, plain=True)
        yield ToPack(prefix + "output", attention.output, None, attention.output_bias)
        yield ToPack(prefix + "mlp_norm", layer.mlp_norm, plain=True)
        if isinstance(mlp, Mlp):
            yield from _mlp_entries(prefix, mlp, spec.intermediate_size)
        else:
            assert spec.moe is not None, f"layer {index} has experts"
            yield from _sparse_entries(prefix, mlp, spec.moe)
    yield ToPack("final_norm", source.final_norm(), plain=True)
    yield ToPack("head", source.head())


def _mlp_entries(prefix: str, mlp: Mlp[Matrix], intermediate: int, file: str = WEIGHTS) -> Iterator[ToPack]:
    yield ToPack(prefix + "gate_up", mlp.gate_up, gate_up_rows(intermediate), mlp.gate_up_bias, file=file)
    yield ToPack(prefix + "down", mlp.down, None, mlp.down_bias, file=file)


def _sparse_entries(prefix: str, mlp: SparseMlp[Matrix], moe: MoeSpec) -> Iterator[ToPack]:
    router, bias = mlp.router.float(), mlp.router_bias
    if mlp.shared_gate is not None:  # one product gives both
        router = torch.cat((router, mlp.shared_gate.float()))
        bias = None if bias is None else torch.cat((bias.float(), torch.zeros(1)))
    yield ToPack(prefix + "router", router, None, bias, exact=True)
    if mlp.correction_bias is not None:
        yield ToPack(prefix + "correction_bias", mlp.correction_bias, plain=True)
    if mlp.shared is not None:
        yield from _mlp_entries(prefix + "shared.", mlp.shared, moe.shared_intermediate_size)
    for expert in range(moe.num_experts):
        yield from _mlp_entries(_expert(prefix, expert), mlp.expert(expert), moe.intermediate_size, EXPERTS)


def _expert(prefix: str, expert: int) -> str:
    return f"{prefix}expert.{expert}."


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
    prefix, moe = f"{index}.", spec.sparse(index)
    return PackedLayer(
        input_norm=packed.arrays[prefix + "input_norm"],
        q_norm=packed.arrays.get(prefix + "q_norm"),
        k_norm=packed.arrays.get(prefix + "k_norm"),
        mlp_norm=packed.arrays[prefix + "mlp_norm"],
        qkv=packed.matrices[prefix + "qkv"],
        output=packed.matrices[prefix + "output"],
        gate_up=packed.matrices.get(prefix + "gate_up"),
        down=packed.matrices.get(prefix + "down"),
        window=spec.windows[index],
        moe=None if moe is None else _moe(packed, moe, prefix),
        norm_whole=spec.qk_norm_whole,
    )


def _moe(packed: PackedFile, moe: MoeSpec, prefix: str) -> PackedMoe:
    def mlp(name: str) -> PackedExpert:
        return PackedExpert(packed.matrices[name + "gate_up"], packed.matrices[name + "down"])

    experts = [mlp(_expert(prefix, expert)) for expert in range(moe.num_experts)]
    shared = mlp(prefix + "shared.") if moe.shared_intermediate_size else None
    alike = all(expert.same_form(experts[0]) for expert in experts)
    if not alike or (shared is not None and shared.gate_up.format != experts[0].gate_up.format):
        raise NotHere(f"layer {prefix[:-1]} holds its experts in different formats")
    return PackedMoe(
        routing=routing_of(moe),
        router=packed.matrices[prefix + "router"],
        correction_bias=packed.arrays.get(prefix + "correction_bias"),
        experts=experts,
        shared=shared,
        shared_gated=moe.shared_gate,
        clamped=(moe.swiglu_alpha, moe.swiglu_limit) if moe.activation == "clamped_swiglu" else None,
    )


def _angles(spec: DecoderSpec, max_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos, sin [max_positions, head_dim / 2], computed in float32 as transformers does."""
    frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()
