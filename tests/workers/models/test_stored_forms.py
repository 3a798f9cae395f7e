"""GPTQ, AWQ and compressed-tensors against what an independent packer was given."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workers.models.tiny_quantized import (
    Fields,
    Matrix,
    awq,
    compressed_int,
    compressed_packed,
    gptq,
    write_quantized,
)
from workers.models.catalog import prepare_model
from workers.models.checkpoint import read_json
from workers.models.decoder import load_decoder
from workers.models.errors import ModelError
from workers.models.matrix_form import MatrixForm, to_float
from workers.models.quantized import ChannelWeight, GroupedWeight
from workers.models.scheme import Scheme, choose_scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource


def compressed(num_bits: int, group: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head"],
        **more,
    }


W8A8 = compressed(8, -1, format="int-quantized")
W8A8["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}

Case = tuple[dict[str, Any], Callable[[Matrix], Fields], int, int, bool]
CASES: dict[str, Case] = {
    "gptq g32": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq, 4, 32, False),
    "gptq g64 symmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
        gptq,
        4,
        64,
        True,
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
        functools.partial(gptq, version=2),
        4,
        64,
        False,
    ),
    "gptq whole rows": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, gptq, 4, -1, False),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 64}, gptq, 8, 64, True),
    "gptq 8 bits whole rows": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq, 8, -1, True),
    "awq g64": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "zero_point": True},
        awq,
        4,
        64,
        False,
    ),
    "awq g32 old names": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "gemm"},
        awq,
        4,
        32,
        False,
    ),
    "compressed g64": (compressed(4, 64), compressed_packed, 4, 64, True),
    "compressed g32 asymmetric": (
        compressed(4, 32, symmetric=False),
        functools.partial(compressed_packed, asymmetric=True),
        4,
        32,
        False,
    ),
    "compressed 4 bits channel": (compressed(4, -1), compressed_packed, 4, -1, True),
    "compressed packed 8 bits": (compressed(8, 32), compressed_packed, 8, 32, True),
    "compressed int8 channel": (W8A8, compressed_int, 8, -1, True),
    "compressed int8 g64": (compressed(8, 64, format="int-quantized"), compressed_int, 8, 64, True),
}


def write(path: Path, case: Case, config: dict[str, Any] | None = None) -> dict[str, Matrix]:
    quantization, pack, bits, group, symmetric = case
    return write_quantized(
        path, quantization, pack, bits=bits, group=group, symmetric=symmetric, config=config
    )


def source(path: Path, name: Any = "stored") -> WeightSource:
    return WeightSource(path, DecoderSpec.from_config(read_json(path / "config.json")), Scheme(name))


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_that_were_packed(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    packed = write(tmp_path, case)
    _, _, bits, _, symmetric = case
    assert choose_scheme("auto", tmp_path) == Scheme("stored")
    for index, layer in enumerate(source(tmp_path).layers()):
        prefix = f"model.layers.{index}."
        for got, modules in (
            (layer.attention.qkv, [f"self_attn.{part}_proj" for part in "qkv"]),
            (layer.attention.output, ["self_attn.o_proj"]),
            (layer.mlp.gate_up, ["mlp.gate_proj", "mlp.up_proj"]),
            (layer.mlp.down, ["mlp.down_proj"]),
        ):
            matrices = [packed[prefix + module] for module in modules]
            expected = np.concatenate([matrix.values() for matrix in matrices])
            by_row = bits == 8 and matrices[0].scale.shape[1] == 1
            assert isinstance(got, ChannelWeight if by_row else GroupedWeight)
            if "int8" in name:  # its scales are stored as bfloat16
                tolerance = np.abs(expected) * 2.0**-8
            else:  # a minimum is rounded to float16; scale * 8 is exact
                tolerance = np.full(expected.shape, 0 if symmetric else 0.1 * 15 * 2.0**-11)
            assert (np.abs(got.dequantize() - expected) <= tolerance + 1e-6).all()
    assert isinstance(source(tmp_path).head(), torch.Tensor)  # stored as floats, served as floats


@pytest.mark.parametrize("name", ["gptq g32", "awq g64", "compressed int8 channel"])
def test_the_torch_decoder_runs_them(tmp_path: Path, name: str) -> None:
    write(tmp_path, CASES[name])
    prepared = prepare_model(str(tmp_path))
    assert load_decoder(prepared.path, torch.float32, torch.device("cpu")).spec.num_layers == 2
    floats, stored = (list(source(tmp_path, scheme).layers())[1] for scheme in ("none", "stored"))
    assert isinstance(floats.attention.qkv, torch.Tensor)
    assert torch.equal(floats.attention.qkv, to_float(stored.attention.qkv))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_other_schemes_quantize_what_was_stored(tmp_path: Path, name: str) -> None:
    write(tmp_path, CASES["gptq g32"])
    exact = to_float(next(source(tmp_path).layers()).mlp.down)
    down = to_float(next(source(tmp_path, name).layers()).mlp.down)
    if name == "int4":
        assert torch.equal(down, exact)  # four bits are four bits
    else:
        assert 0 < (down - exact).abs().max() < 0.02


def test_own_biases_are_kept_and_empty_ones_dropped(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq g32"], {"model_type": "qwen2"})
    held = load_file(tmp_path / "model.safetensors")
    held["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(held, tmp_path / "model.safetensors")
    layer = next(source(tmp_path).layers())
    assert layer.attention.qkv_bias is not None
    assert layer.attention.qkv_bias.any()
    assert layer.attention.output_bias is None
    held["model.layers.0.self_attn.o_proj.bias"] += 1
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="o_proj has a bias"):
        next(source(tmp_path).layers())


def scatter(path: Path, packed: dict[str, Matrix], alike: bool) -> dict[str, np.ndarray]:
    """Gives the inputs of each layer to groups at random, q, k and v as `alike`. The values that are then meant."""
    held, values = load_file(path / "model.safetensors"), {}
    for seed, (module, matrix) in enumerate(packed.items()):
        group = matrix.k // matrix.scale.shape[1]
        seed = 0 if alike else seed
        g_idx = np.random.default_rng(seed).permutation(matrix.k) // group
        held[module + ".g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        values[module] = matrix.scale[:, g_idx].astype(np.float64) * (matrix.q - matrix.zero[:, g_idx])
    save_file(held, path / "model.safetensors")
    return values


@pytest.mark.parametrize("alike", [True, False])
def test_act_order(tmp_path: Path, alike: bool) -> None:
    """Inputs of a group that are not neighbours: as stored where kernels can take it, else in eight bits."""
    values = scatter(tmp_path, write(tmp_path, CASES["gptq g32"]), alike)
    spec, scheme = DecoderSpec.from_config(read_json(tmp_path / "config.json")), Scheme("stored")
    prefix = "model.layers.1.self_attn."
    qkv = np.concatenate([values[f"{prefix}{part}_proj"] for part in "qkv"])
    for every_form in (True, False):
        form = MatrixForm(scheme, every_form=every_form)
        attention = list(WeightSource(tmp_path, spec, scheme, form=form).layers())[1].attention
        for got, want, scattered in (
            (attention.qkv, qkv, every_form and alike),
            (attention.output, values[prefix + "o_proj"], every_form),
        ):
            assert isinstance(got, GroupedWeight)
            assert (got.format, got.order is not None) == (("q4", True) if scattered else ("q8", False))
            # Eight bits: half of a group's largest / 127; four: minima rounded to float16.
            tolerance = 0.1 * 15 * 2.0**-11 if scattered else 0.1 * 15 / 127 / 2 + 0.002
            assert np.abs(got.dequantize() - want).max() <= tolerance


def test_groups_of_the_wrong_size_are_told(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq g32"])
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    held[name] = torch.zeros_like(held[name])
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj\.g_idx does not put 32 inputs into each of 2 groups"):
        next(source(tmp_path).layers())
    del held[name]  # not every writer gives one
    save_file(held, tmp_path / "model.safetensors")
    next(source(tmp_path).layers())


def test_eight_bits_with_zero_points_are_refused(tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 8, "group_size": 64}
    write(tmp_path, (quantization, gptq, 8, 64, False))
    with pytest.raises(ModelError, match="8-bit weights with zero points are not read"):
        next(source(tmp_path).layers())


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    write(tmp_path, CASES["compressed g64"])
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    held[name] = held[name].float() * 1e7
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj has scales beyond float16"):
        next(source(tmp_path).layers())


def test_missing_and_wrongly_shaped_parts_are_named(tmp_path: Path) -> None:
    write(tmp_path, CASES["awq g64"])
    held = load_file(tmp_path / "model.safetensors")
    scales = held.pop("model.layers.0.mlp.up_proj.scales")
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"misses tensors: model\.layers\.0\.mlp\.up_proj\.scales"):
        source(tmp_path)
    held["model.layers.0.mlp.up_proj.scales"] = scales[:, :7].contiguous()
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.scales is \[1, 7\], not \[1, 192\]"):
        source(tmp_path)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "bitsandbytes"},
        "'bitsandbytes' are not read; gptq, awq, compressed-tensors, fp8, mxfp4 and GGUF",
    ),
    ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits 3; read are 4, 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size 16; read are 32, 64, 128, -1"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:x": {}}}, "dynamic"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "'marlin'"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "'gemv'; read are 'gemm'"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, "zero_point False"),
    (compressed(4, 64, config_groups={}), "0 config_groups"),
    (compressed(4, 64, format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    (compressed(2, 64), "num_bits 2; read are 4, 8"),
    (compressed(4, 16), "group_size 16"),
    (compressed(4, 64, sparsity_config={"format": "sparse-24"}), "sparsity_config"),
]


@pytest.mark.parametrize(("quantization", "named"), BAD, ids=[named for _, named in BAD])
def test_what_is_not_read_is_named(tmp_path: Path, quantization: dict[str, Any], named: str) -> None:
    write(tmp_path, CASES["gptq g32"])
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as raised:
        prepare_model(str(tmp_path))
    assert named in str(raised.value)


def test_groups_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path, CASES["gptq g32"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="groups of 128 do not divide 192 inputs"):
        source(tmp_path)
