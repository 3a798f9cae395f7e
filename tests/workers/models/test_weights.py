from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.models.checkpoint import INDEX_NAME, read_headers, read_json
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model
from workers.models.spec import DecoderSpec
from workers.models.weights import DecoderWeights, load_weights

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model", "qwen2")


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return load_weights(path, DecoderSpec.from_config(read_json(path / "config.json")), dtype, CPU)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    held = load_file(path / "model.safetensors")
    for key, value in tensors.items():
        name = key.replace("__", ".")
        if value is None:
            del held[name]
        else:
            held[name] = value
    save_file(held, path / "model.safetensors")


def shard(path: Path) -> None:
    held = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 2 + 1}.safetensors" for number, name in enumerate(held)}
    for file in set(weight_map.values()):
        save_file({name: held[name] for name in held if weight_map[name] == file}, path / file)
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_projections_are_fused(model: Path) -> None:
    held = load_file(model / "model.safetensors")
    weights = load(model)
    layer = list(weights.layers)[1]
    prefix = "model.layers.1."
    qkv = [held[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.attention.qkv, torch.cat(qkv))
    assert layer.attention.qkv_bias is not None
    assert torch.equal(
        layer.attention.qkv_bias, torch.cat([held[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"])
    )
    gate_up = [held[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up, torch.cat(gate_up))
    assert layer.attention.output_bias is None
    assert layer.attention.q_norm is None
    assert weights.head is weights.embedding  # tied


def test_dtype_is_the_asked_one(model: Path) -> None:
    weights = load(model, torch.bfloat16)
    layer = next(iter(weights.layers))
    tensors = [
        weights.embedding,
        weights.final_norm,
        layer.attention.qkv,
        layer.attention.qkv_bias,
        layer.mlp.down,
        layer.mlp_norm,
    ]
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.bfloat16}


def test_weights_outlive_their_file(model: Path) -> None:
    weights = load(model)
    before = weights.final_norm.clone()
    change(model, model__norm__weight=torch.zeros(64))
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    assert torch.equal(weights.final_norm, before)


def test_shards_equal_the_single_file(model: Path) -> None:
    whole = list(load(model).layers)
    shard(model)
    for one, other in zip(whole, load(model).layers, strict=True):
        assert torch.equal(one.attention.qkv, other.attention.qkv)
        assert torch.equal(one.mlp.down, other.mlp.down)


def test_harmless_extras_are_ignored(model: Path) -> None:
    change(
        model,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8),
        lm_head__weight=torch.zeros(259, 64),  # tied: a copy of the embedding
    )
    load(model)


def test_bad_tensors_are_named(model: Path) -> None:
    change(model, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"misses tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(model)
    change(model, model__layers__1__mlp__up_proj__weight=torch.zeros(64, 128))
    with pytest.raises(ModelError, match=r"up_proj\.weight is \[64, 128\], not \[128, 64\]"):
        load(model)
    change(model, model__layers__1__mlp__up_proj__weight=torch.zeros(128, 64), model__extra=torch.zeros(1))
    with pytest.raises(ModelError, match=r"unexpected tensors: model\.extra"):
        load(model)
    change(model, model__extra=None, model__norm__weight=torch.zeros(64, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"quantized tensors: model\.norm\.weight is I8"):
        load(model)


def test_many_bad_tensors_are_counted(model: Path) -> None:
    (model / "model.safetensors").unlink()
    save_file({"model.norm.weight": torch.zeros(64)}, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"misses tensors: .* and \d+ more"):
        load(model)


def test_pickles_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors and GGUF are read"):
        load(model)


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load(model)


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "text", "huge_header", "no_offsets"])
def test_damaged_files_are_refused(model: Path, damage: str) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    damaged = {
        "truncated": data[:-1],
        "longer": data + b"\0",
        "empty": b"",
        "text": b"this is not a safetensors file at all",
        "huge_header": b"\xff" * 8 + data[8:],
        "no_offsets": _without_offsets(data),
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_headers(model)


def _without_offsets(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = []
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_missing_shard(model: Path) -> None:
    shard(model)
    (model / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors is named by"):
        load(model)


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../model.safetensors"}}']
)
def test_bad_index(model: Path, index: str) -> None:
    (model / INDEX_NAME).write_text(index)
    with pytest.raises(ModelError, match="index"):
        load(model)
