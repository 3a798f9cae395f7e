"""Decoders whose weights stay quantized on the device, against the same values as floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantized_experts import ExpertStack
from kernels.quantized_matrix import QuantizedMatrix
from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, Sequence, step
from tests.workers.models.test_stored_forms import CASES, scatter, write
from workers.models.checkpoint import read_json
from workers.models.decoder import Decoder
from workers.models.device_matrix import on_device
from workers.models.moe import float_expert
from workers.models.quantize import quantize_channels, quantize_q8
from workers.models.random_model import write_random_model
from workers.models.scheme import Scheme, SchemeName
from workers.models.spec import DecoderSpec
from workers.models.weights import DecoderWeights, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def load(path: Path, name: SchemeName, keep: bool, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    return load_weights(path, spec, dtype, CPU, Scheme(name), keep_quantized=keep)


def logits(path: Path, weights: DecoderWeights) -> Tensor:
    decoder = Decoder(DecoderSpec.from_config(read_json(path / "config.json")), weights)
    sequence = Sequence(decoder, decoder.new_kv_cache(6, BLOCK_SIZE), torch.arange(20), torch.arange(5))
    for count in (19, 1):
        step(decoder, sequence._kv_cache, [(sequence, count)])
    return torch.cat(sequence.logits)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "int8"),
        ("qwen2", "int4"),
        ("qwen3", "fp8"),
        ("deepseek_v3", "fp8"),
        ("gpt_oss", "int8"),
        ("mixtral", "int4"),
    ],
)
def test_the_same_logits(tmp_path: Path, family: str, name: SchemeName) -> None:
    path = write_random_model(tmp_path, family)
    kept, floats = load(path, name, True), load(path, name, False)
    torch.testing.assert_close(logits(path, kept), logits(path, floats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gptq g32", "awq g64", "compressed int8 channel"])
def test_what_was_stored_is_kept(tmp_path: Path, name: str) -> None:
    write(tmp_path, CASES[name])
    kept = load(tmp_path, "stored", True)
    layer = next(iter(kept.layers))
    products = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)  # type: ignore[union-attr]
    format = "int8" if "int8" in name else "int4"
    assert [part.format for part in products if isinstance(part, QuantizedMatrix)] == [format] * 4
    torch.testing.assert_close(
        logits(tmp_path, kept), logits(tmp_path, load(tmp_path, "stored", False)), rtol=1e-4, atol=1e-4
    )


def test_what_stays_floats(tmp_path: Path) -> None:
    """Embeddings are looked up, latents folded, routers and norms decide: none is worth its bits."""
    weights = load(write_random_model(tmp_path / "dense"), "int8", True, torch.bfloat16)
    assert isinstance(weights.head, QuantizedMatrix)
    assert weights.head.dtype == weights.embedding.dtype == torch.bfloat16
    assert weights.embedding.shape == weights.head.shape  # tied: the values of the head
    latent = load(write_random_model(tmp_path / "mla", "deepseek_v3"), "fp8", True)
    assert isinstance(latent.head, QuantizedMatrix)
    assert latent.head.format == "int8"
    layers = list(latent.layers)
    attention, mlp = layers[-1].attention, layers[-1].mlp
    floats = (attention.kv_up, attention.kv_norm, mlp.router, layers[-1].mlp_norm)  # type: ignore[union-attr]
    assert all(isinstance(part, Tensor) for part in floats)
    kept = (attention.down, attention.output, mlp.shared.down, mlp.expert(0).gate_up)  # type: ignore[union-attr]
    assert [part.format for part in kept if isinstance(part, QuantizedMatrix)] == ["fp8"] * 4


def test_memory_is_that_of_the_bits(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    sizes = {}
    for name, bits in (("int8", 8.5), ("int4", 5.0), ("fp8", 8.0)):
        down = next(iter(load(path, name, True).layers)).mlp.down  # type: ignore[union-attr, arg-type]
        assert isinstance(down, QuantizedMatrix)
        sizes[name] = down.nbytes * 8 / (256 * 512)
        assert sizes[name] == pytest.approx(bits, rel=0.02)


def test_experts_that_are_passed_on_are_floats(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "mixtral")
    kept, floats = (next(iter(load(path, "int8", keep).layers)).mlp.expert(1) for keep in (True, False))  # type: ignore[union-attr]
    assert isinstance(kept.down, QuantizedMatrix)
    assert torch.equal(float_expert(kept).down, floats.down)
    assert torch.equal(float_expert(kept).gate_up, floats.gate_up)


def test_experts_with_scattered_inputs_come_in_order(tmp_path: Path) -> None:
    packed = write(tmp_path, CASES["gptq g32"], {"model_type": "qwen3_moe"})
    values = scatter(tmp_path, packed, alike=True)
    assert any("experts" in name for name in values)
    kept, floats = (
        next(iter(load(tmp_path, "stored", keep).layers)).mlp.expert(0)  # type: ignore[union-attr]
        for keep in (True, False)
    )
    assert isinstance(kept.gate_up, QuantizedMatrix)
    assert (kept.gate_up.format, kept.gate_up.order) == ("int8", None)
    assert torch.equal(float_expert(kept).gate_up, floats.gate_up)
    prefix = "model.layers.0.mlp.experts.0."
    exact = np.concatenate([values[f"{prefix}{part}_proj"] for part in ("gate", "up")])
    assert np.abs(floats.gate_up.numpy() - exact).max() <= 0.1 * 15 / 127 / 2 + 0.002


def test_unlike_experts_are_told() -> None:
    stack, weight = ExpertStack(2), torch.ones(4, 64)
    stack.put(0, on_device(quantize_q8(weight), torch.float32, CPU))
    with pytest.raises(
        ValueError, match=r"expert 1 is int8 \[4, 64\] by 64, others are int8 \[4, 64\] by 32"
    ):
        stack.put(1, on_device(quantize_channels(weight), torch.float32, CPU))
