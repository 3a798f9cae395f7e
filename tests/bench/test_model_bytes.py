"""Bytes by format against real tensors and blocks; FLOPs against products counted one by one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file

from bench.engine.model_bytes import (
    Work,
    decode_work,
    experts_read,
    matrices,
    matrix_bytes,
    prefill_work,
    weight_bytes,
)
from workers.models.quantize import quantize_q8
from workers.models.random_model import write_random_model
from workers.models.spec import DecoderSpec, MoeSpec


@pytest.fixture(scope="module", params=["llama", "qwen3", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = (
        {"model_type": "llama", "tie_word_embeddings": True} if request.param == "tied" else request.param
    )
    return write_random_model(tmp_path_factory.mktemp("model"), config)


def spec_of(model: Path) -> DecoderSpec:
    return DecoderSpec.from_config(json.loads((model / "config.json").read_text()))


def test_floats_are_the_tensors_that_a_step_reads(model: Path) -> None:
    spec = spec_of(model)
    tensors = load_file(model / "model.safetensors")
    if not spec.tied_embeddings:
        del tensors["model.embed_tokens.weight"]  # single rows of it only
    assert weight_bytes(spec, "fp32") == sum(tensor.nbytes for tensor in tensors.values())
    halves = sum(tensor.nbytes // (2 if tensor.ndim > 1 else 1) for tensor in tensors.values())
    assert weight_bytes(spec, "bf16") == halves


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"])
def test_experts_and_latents(tmp_path: Path, family: str) -> None:
    """All experts: what the file holds. A token: the experts that it takes."""
    path = write_random_model(tmp_path, {"model_type": family, "num_hidden_layers": 3})
    spec, tensors = spec_of(path), load_file(path / "model.safetensors")
    moe = spec.moe
    assert moe is not None
    del tensors["model.embed_tokens.weight"]
    assert weight_bytes(spec, "fp32") == sum(tensor.nbytes for tensor in tensors.values())
    one = sum(tensor.nbytes for name, tensor in tensors.items() if ".2." in name and ".experts.0." in name)
    left_out = (moe.num_experts - moe.top_k) * sum(moe.layers) * one
    assert weight_bytes(spec, "fp32", 1) == pytest.approx(weight_bytes(spec, "fp32") - left_out)
    assert weight_bytes(spec, "fp32", 1000) == pytest.approx(weight_bytes(spec, "fp32"))
    taken = sum(rows * columns for rows, columns in matrices(spec)) * 4
    vectors = sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim == 1)
    assert weight_bytes(spec, "fp32", 1) == pytest.approx(taken + vectors + spec.vocab_size * 64 * 4)


def test_experts_of_a_batch_are_expected_by_chance() -> None:
    """Against every way in which two tokens can take 2 of 4 experts each."""
    moe = MoeSpec(layers=(True,), num_experts=4, top_k=2, intermediate_size=1)
    pairs = [set(pair) for pair in itertools.combinations(range(4), 2)]
    mean = sum(len(a | b) for a in pairs for b in pairs) / len(pairs) ** 2
    assert experts_read(moe, 2) == pytest.approx(mean)


def test_int8_is_what_the_quantizer_makes(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    quantized = quantize_q8(tensors["model.layers.0.mlp.down_proj.weight"])
    assert matrix_bytes(*quantized.shape, "int8") == quantized.q.nbytes + quantized.d.nbytes


@pytest.mark.parametrize(("kind", "head"), [("Q4_1", False), ("Q8_0", True)])
def test_int4_groups_are_as_large_as_ggufs_blocks(kind: str, head: bool) -> None:
    weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert matrix_bytes(48, 576, "int4", head=head) == 48 * 576 / weights * block_bytes


def test_decode_flops_are_those_of_every_product(model: Path) -> None:
    spec, batch, context = spec_of(model), 3, 40
    linear = (
        sum(2 * rows * columns for rows, columns in matrices(spec)) + 2 * spec.vocab_size * spec.hidden_size
    )
    attention = spec.num_layers * spec.num_heads * 2 * (2 * context * spec.head_dim)
    work = decode_work(spec, "bf16", 100.0, batch, context)
    assert work.flops == batch * (linear + attention)
    assert work.bytes == weight_bytes(spec, "bf16") + batch * context * 100.0


def test_a_window_bounds_what_is_read_and_computed(model: Path) -> None:
    spec = spec_of(model)
    narrow = replace(spec, windows=(16,) * spec.num_layers)
    assert decode_work(narrow, "bf16", 100.0, 1, 4096) == decode_work(spec, "bf16", 100.0, 1, 16)


def test_prefill_is_causal_and_its_chunks_read_the_weights_again(model: Path) -> None:
    spec, tokens = spec_of(model), 50
    whole, chunked = (prefill_work(spec, "bf16", 10.0, tokens, chunk) for chunk in (64, 20))
    by_token = sum(decode_work(spec, "bf16", 0.0, 1, position + 1).flops for position in range(tokens))
    heads = (tokens - 1) * 2 * spec.vocab_size * spec.hidden_size  # only the last token's logits are wanted
    assert whole.flops == chunked.flops == by_token - heads
    assert whole.bytes == weight_bytes(spec, "bf16") + tokens * 10.0
    assert chunked.bytes == 3 * weight_bytes(spec, "bf16") + (tokens + 20 + 40) * 10.0


def test_the_floor_is_the_larger_one() -> None:
    work = Work(bytes=100.0, flops=1000.0)
    assert work.floor_s(bytes_per_s=50.0, flops_per_s=10_000.0) == 2.0
    assert work.floor_s(bytes_per_s=50.0, flops_per_s=100.0) == 10.0
