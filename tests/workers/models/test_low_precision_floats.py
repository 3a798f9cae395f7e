"""float8 and MXFP4 checkpoints against transformers' own widening of the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, Sequence, step
from workers.models.checkpoint import read_json
from workers.models.decoder import load_decoder
from workers.models.errors import ModelError
from workers.models.matrix_form import MatrixForm, to_float
from workers.models.mxfp4 import widen
from workers.models.quantized import Fp8Weight
from workers.models.random_model import write_random_model
from workers.models.scheme import choose_scheme
from workers.models.spec import DecoderSpec
from workers.models.weight_source import WeightSource

pytestmark = pytest.mark.usefixtures("one_thread")

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}


def logits(path: Path) -> Tensor:
    decoder = load_decoder(path, torch.float32, CPU)
    sequence = Sequence(decoder, decoder.new_kv_cache(6, BLOCK_SIZE), torch.arange(20), torch.arange(5))
    step(decoder, sequence._kv_cache, [(sequence, 20)])
    return sequence.logits[0]


def rewrite(path: Path, tensors: dict[str, Tensor], **config: object) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_float8(tmp_path: Path, family: str) -> None:
    """As DeepSeek-V3 and the FP8 releases of Qwen3-MoE are stored, rows that fill no whole block included."""
    path = write_random_model(tmp_path, family)
    widened, stored = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        apart = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
        if tensor.ndim != 2 or any(part in name for part in apart):
            widened[name] = stored[name] = tensor
            continue
        n, k = tensor.shape
        q = (tensor * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-n // 16), -(-k // 8)) * 0.02 + 0.01
        stored[name], stored[name + "_scale_inv"] = q, scale
        whole = torch.zeros(len(scale) * 16, k, dtype=torch.float8_e4m3fn)
        whole[:n] = q
        widened[name] = Fp8Dequantize(None)._dequantize_one(whole, scale, torch.float32)[:n].contiguous()
    rewrite(path, widened)
    expected = logits(path)
    # Layers behind the last one are DeepSeek's further-token predictors.
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(4, 4)} if family == "deepseek_v3" else {}
    rewrite(path, {**stored, **extra}, quantization_config=FP8)
    torch.testing.assert_close(logits(path), expected, rtol=1e-5, atol=1e-5)
    assert choose_scheme("auto", path).name == "stored"


def float_quantized(**weights: object) -> dict[str, object]:
    """As llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


# name -> quantization_config, the shape of a layer's scales by its outputs and inputs
SCALES: dict[str, tuple[dict[str, object], Callable[[int, int], tuple[int, ...]]]] = {
    "dynamic": (float_quantized(strategy="channel"), lambda n, k: (n, 1)),
    "of the tensor": (float_quantized(strategy="tensor"), lambda n, k: (1,)),
    "blocks": (
        float_quantized(strategy="block", block_structure=[16, 128]),
        lambda n, k: (-(-n // 16), -(-k // 128)),
    ),
    "one number": ({"quant_method": "fp8", "activation_scheme": "static"}, lambda n, k: ()),
}


@pytest.mark.parametrize("name", SCALES)
def test_float8_scales(tmp_path: Path, name: str) -> None:
    """Values, and the form in which kernels for float8 take them."""
    config, shape = SCALES[name]
    path = write_random_model(tmp_path, {"intermediate_size": 192})
    stored, widened = {}, {}
    for key, tensor in load_file(path / "model.safetensors").items():
        if "_proj.weight" not in key:
            stored[key] = widened[key] = tensor
            continue
        n, k = tensor.shape
        q, scale = (tensor * 50).to(torch.float8_e4m3fn), torch.rand(shape(n, k)) * 0.02 + 0.01
        stored |= {key: q, key + "_scale": scale, key.removesuffix("weight") + "input_scale": torch.ones(1)}
        by_weight = scale.reshape(-1, 1)
        if name == "blocks":
            by_weight = scale.repeat_interleave(16, 0)[:n].repeat_interleave(128, 1)[:, :k]
        widened[key] = q.float() * by_weight
    rewrite(path, stored, quantization_config=config)
    scheme = choose_scheme("auto", path)
    assert scheme.name == "stored"
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    prefix = "model.layers.1."
    wanted = {
        "qkv": torch.cat([widened[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]),
        "down": widened[prefix + "mlp.down_proj.weight"],
    }
    for every_form in (False, True):
        form = MatrixForm(scheme, every_form=every_form)
        layer = list(WeightSource(path, spec, scheme, form=form).layers())[1]
        found = {"qkv": layer.attention.qkv, "down": layer.mlp.down}  # type: ignore[union-attr]
        for part, matrix in found.items():
            assert isinstance(matrix, Fp8Weight if every_form else Tensor)
            assert torch.equal(to_float(matrix), wanted[part])


def test_scales_of_another_number_are_told(tmp_path: Path) -> None:
    path = write_random_model(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    quantization = float_quantized(strategy="channel")
    rewrite(path, {**tensors, name + "_scale": torch.ones(3)}, quantization_config=quantization)
    with pytest.raises(
        ModelError, match=r"weight_scale has shape \[3\]; one scale is read, or one for each of"
    ):
        logits(path)


def test_every_float8_has_its_value() -> None:
    bits = torch.arange(256).to(torch.uint8)
    found = Fp8Weight(bits.numpy()[None], np.ones((1, 1), np.float32), 256).dequantize()
    wanted = bits.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(found[0], wanted)  # NaN where NaN


def test_float8_of_another_type_is_told(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "qwen3")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e5m2)
    rewrite(path, {**tensors, name + "_scale_inv": torch.ones(8, 8)}, quantization_config=FP8)
    with pytest.raises(ModelError, match=r"up_proj\.weight is torch\.float8_e5m2, not float8_e4m3fn"):
        logits(path)
    rewrite(path, {**tensors, name + "_scale_inv": torch.ones(8, 7)})
    with pytest.raises(ModelError, match=r"weight_scale_inv is \[8, 7\], not \[8, 8\]"):
        logits(path)


def test_mxfp4_values() -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [experts, in, out]
    for expert in range(2):
        assert torch.equal(widen(blocks[expert], scales[expert]).T, theirs[expert])


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "gpt_oss")
    tensors = load_file(path / "model.safetensors")
    widened, stored = dict(tensors), {}
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
        stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
        widened[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    rewrite(path, widened)
    expected = logits(path)
    rewrite(path, stored, quantization_config={"quant_method": "mxfp4"})
    assert torch.equal(logits(path), expected)
