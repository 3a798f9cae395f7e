"""What a scheme makes of a checkpoint, against the quantizers and the files themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from tests.workers.models.tiny_gguf import write_gguf
from workers.models.catalog import prepare_model
from workers.models.checkpoint import read_json
from workers.models.errors import ModelError
from workers.models.gguf_blocks import GgufBlocks
from workers.models.quantize import quantize_q4, quantize_q8
from workers.models.quantized import GroupedWeight
from workers.models.random_model import write_random_model
from workers.models.scheme import Scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import Matrix, WeightSource, to_float
from workers.models.weights import load_weights

DOWN = "model.layers.1.mlp.down_proj.weight"


def source(path: Path, name: Any) -> WeightSource:
    return WeightSource(path, DecoderSpec.from_config(read_json(path / "config.json")), Scheme(name))


def same(one: Matrix, other: Matrix) -> bool:
    if isinstance(one, GroupedWeight) and isinstance(other, GroupedWeight) and one.format != other.format:
        return False
    return type(one) is type(other) and torch.equal(to_float(one), to_float(other))


def last_layer(path: Path, name: str) -> Any:
    return list(source(path, name).layers())[-1]


def imported(tmp_path: Path, kind: GGMLQuantizationType, **config: Any) -> Path:
    hf = write_random_model(tmp_path / "hf", {"vocab_size": 260, **config})
    return prepare_model(str(write_gguf(hf, tmp_path / "m.gguf", quantization=kind)), tmp_path / "cache").path


@pytest.mark.parametrize("tied", [False, True])
def test_floats_are_quantized_as_the_scheme_says(tmp_path: Path, tied: bool) -> None:
    model = write_random_model(tmp_path, {"tie_word_embeddings": tied})
    held = load_file(model / "model.safetensors")
    head = held["model.embed_tokens.weight" if tied else "lm_head.weight"]
    gate_up = torch.cat([held[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    for name, matrix, head_matrix in (
        ("none", gate_up, head),
        ("stored", gate_up, head),
        ("int8", quantize_q8(gate_up), quantize_q8(head)),
        ("int4", quantize_q4(gate_up), quantize_q8(head)),
    ):
        layer = last_layer(model, name)
        assert same(layer.mlp.gate_up, matrix)
        assert same(source(model, name).head(), head_matrix)
        assert torch.equal(layer.mlp_norm, held["model.layers.1.post_attention_layernorm.weight"])
        embedding = source(model, name).embedding()
        assert embedding is None if tied else torch.equal(embedding, held["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_are_served_as_stored(tmp_path: Path, kind: str) -> None:
    path = imported(tmp_path, GGMLQuantizationType[kind])
    blocks = GgufBlocks(path)
    layer = last_layer(path, "stored")
    assert same(layer.mlp.down, blocks.read(DOWN))
    qkv = [blocks.read(f"model.layers.1.self_attn.{part}_proj.weight").dequantize() for part in "qkv"]
    assert isinstance(layer.attention.qkv, GroupedWeight)
    assert np.array_equal(layer.attention.qkv.dequantize(), np.concatenate(qkv))
    assert same(source(path, "stored").head(), blocks.read("lm_head.weight"))


def test_four_bits_are_not_rounded_twice(tmp_path: Path) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q4_1)
    assert same(last_layer(path, "int4").mlp.down, GgufBlocks(path).read(DOWN))
    assert source(path, "int4").head().format == "q8"  # type: ignore[union-attr]


def test_gguf_types_that_kernels_do_not_hold_become_eight_bits(tmp_path: Path) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q5_0)
    down = last_layer(path, "stored").mlp.down
    assert same(down, quantize_q8(load_file(path / "model.safetensors")[DOWN]))


def test_int8_of_a_gguf_is_of_its_float_tensors(tmp_path: Path) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q4_1)
    down = last_layer(path, "int8").mlp.down
    assert same(down, quantize_q8(load_file(path / "model.safetensors")[DOWN]))


def test_fused_parts_of_different_types_become_eight_bits(tmp_path: Path) -> None:
    """llama.cpp's mixed files keep v in more bits than q and k."""
    hf = write_random_model(tmp_path / "hf", {"vocab_size": 260})
    values = load_file(hf / "model.safetensors")
    v = {
        f"blk.{layer}.attn_v.weight": gguf.quants.quantize(
            values[f"model.layers.{layer}.self_attn.v_proj.weight"].numpy(), GGMLQuantizationType.Q8_0
        )
        for layer in range(2)
    }
    file = write_gguf(hf, tmp_path / "m.gguf", quantization=GGMLQuantizationType.Q4_0, quantized=v)
    path = prepare_model(str(file), tmp_path / "cache").path
    blocks = GgufBlocks(path)
    assert {blocks.types[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"} == {
        "Q4_0",
        "Q8_0",
    }
    qkv = last_layer(path, "stored").attention.qkv
    assert isinstance(qkv, GroupedWeight)
    assert qkv.format == "q8"
    exact = torch.cat(
        [to_float(blocks.read(f"model.layers.1.self_attn.{part}_proj.weight")) for part in "qkv"]
    )
    assert same(qkv, quantize_q8(exact))


@pytest.mark.parametrize("name", ["stored", "int8", "int4"])
def test_the_torch_decoder_gets_the_values_of_the_quantized(tmp_path: Path, name: Any) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q4_1, tie_word_embeddings=True)
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    weights = load_weights(path, spec, torch.float32, torch.device("cpu"), Scheme(name))
    layer = list(weights.layers)[-1]
    assert torch.equal(layer.attention.qkv, to_float(last_layer(path, name).attention.qkv))
    assert weights.embedding is weights.head
    assert torch.equal(weights.head, to_float(source(path, name).head()))


def test_a_checkpoint_with_quantized_tensors_and_no_word_of_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = write_random_model(tmp_path)
    held = load_file(model / "model.safetensors")
    held[DOWN] = held[DOWN].to(torch.int8)
    save_file(held, model / "model.safetensors")
    with pytest.raises(ModelError, match="has quantized tensors"):
        source(model, "none")
