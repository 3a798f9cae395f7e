"""Kept GGUF blocks against the gguf package's own dequantization and against the float tensors beside them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file

from tests.workers.models.tiny_gguf import write_gguf
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import fingerprint
from workers.models.errors import ModelError
from workers.models.gguf_blocks import FILE_NAME, READERS, GgufBlocks
from workers.models.random_model import write_random_model

EXACT = ("Q4_0", "Q4_1", "Q8_0")


def imported(directory: Path, kind: GGMLQuantizationType | None, **config: object) -> Path:
    source = write_random_model(directory / "hf", {"vocab_size": 260, **config})
    file = write_gguf(source, directory / "m.gguf", quantization=kind)
    return prepare_model(str(file), directory / "cache").path


@pytest.mark.parametrize("name", EXACT)
def test_dequantized_equals_ggufs_own(name: str) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(0).normal(size=(48, 320)).astype(np.float32)
    values[3, :32] = 0
    data = gguf.quants.quantize(values, kind)
    ours, theirs = READERS[name](data).dequantize(), gguf.quants.dequantize(data, kind)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", EXACT)
def test_any_bytes_are_read_as_gguf_reads_them(name: str) -> None:
    """Every nibble and sign, scales of either sign and every exponent but those of infinities."""
    kind = GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (64, 512 // block, size), np.uint8)
    blocks[:, :, 1] &= 0xBF  # an exponent below 16: neither infinite nor so large that -8 d is
    blocks[:, :, 3] &= 0xBF if name == "Q4_1" else 0xFF
    data = blocks.reshape(64, -1)
    assert np.array_equal(READERS[name](data).dequantize(), gguf.quants.dequantize(data, kind))


def test_k_quants_lose_only_what_float16_loses() -> None:
    """Against the gguf package on random bytes: every scale, minimum and nibble."""
    kind = GGMLQuantizationType.Q4_K
    blocks = np.random.default_rng(2).integers(0, 256, (64, 2, 144), np.uint8)
    halves = np.random.default_rng(3).uniform(0.01, 0.1, (64, 2, 2)).astype(np.float16)
    blocks[:, :, :4] = halves.view(np.uint8)
    data = blocks.reshape(64, -1)
    ours, theirs = READERS["Q4_K"](data).dequantize(), gguf.quants.dequantize(data, kind)
    spread = np.abs(theirs).reshape(64, -1, 32).max(-1).repeat(32, 1)
    assert (np.abs(ours - theirs) <= spread * 2.0**-10 + 63 * 0.1 * 2.0**-11).all()
    assert np.abs(ours - theirs).mean() < 1e-3 * np.abs(theirs).mean()


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}])
@pytest.mark.parametrize("name", EXACT)
def test_rows_are_in_the_order_of_the_float_tensors(
    tmp_path: Path, name: str, config: dict[str, object]
) -> None:
    path = imported(tmp_path, GGMLQuantizationType[name], **config)
    blocks, floats = GgufBlocks(path), load_file(path / "model.safetensors")
    matrices = {key for key, value in floats.items() if value.ndim == 2}
    assert matrices == blocks.types.keys()
    for key in matrices:
        assert key in blocks
        assert torch.equal(torch.from_numpy(blocks.read(key).dequantize()).bfloat16(), floats[key]), key


def test_the_model_is_still_read_by_its_own_files(tmp_path: Path) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q4_1)
    before = fingerprint(path)
    (path / FILE_NAME).unlink()
    assert fingerprint(path) == before


def test_float_models_keep_no_blocks(tmp_path: Path) -> None:
    assert not GgufBlocks.are_in(imported(tmp_path, None))


def test_types_that_kernels_cannot_hold_are_only_named(tmp_path: Path) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q5_0)
    blocks = GgufBlocks(path)
    name = "model.layers.0.mlp.down_proj.weight"
    assert name not in blocks
    assert blocks.types[name] == "Q5_0"
    assert blocks.was_quantized(name)
    assert not blocks.was_quantized("model.norm.weight")


@pytest.mark.parametrize("damage", ["cut", "empty", "no_types"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = imported(tmp_path, GGMLQuantizationType.Q8_0)
    file = path / FILE_NAME
    data = file.read_bytes()
    file.write_bytes(
        {"cut": data[:-1], "empty": b"", "no_types": data.replace(b'"types"', b'"other"')}[damage]
    )
    with pytest.raises(ModelError, match="gguf_blocks"):
        GgufBlocks(path)


def test_the_default_model_keeps_every_matrix(smollm2: PreparedModel) -> None:
    blocks = GgufBlocks(smollm2.path)
    kinds = {name: blocks.types[name] for name in blocks.types}
    assert kinds.pop("model.embed_tokens.weight") == "Q8_0"
    assert set(kinds.values()) == {"Q4_1"}
    with safe_open(smollm2.path / "model.safetensors", framework="pt") as floats:
        for name in ("model.layers.3.self_attn.k_proj.weight", "model.layers.29.mlp.gate_proj.weight"):
            kept = torch.from_numpy(blocks.read(name).dequantize())
            assert torch.equal(kept.bfloat16(), floats.get_tensor(name))
    assert json.loads((smollm2.path / "config.json").read_text())["dtype"] == "bfloat16"
