"""GGUF files against the Hugging Face directory they were written from, and against transformers' own GGUF loader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.workers.models.test_rope import SCALINGS
from tests.workers.models.tiny_gguf import write_gguf
from workers.models import default_model
from workers.models.catalog import PreparedModel, prepare_model
from workers.models.checkpoint import read_headers
from workers.models.decoder import load_decoder
from workers.models.errors import ModelError
from workers.models.random_model import write_random_model
from workers.models.rope import inverse_frequencies
from workers.models.spec import DecoderSpec

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_biases_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_grouped": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
}


def small(path: Path, **config: Any) -> Path:
    """A vocabulary of 260: the byte tokens and one merge."""
    return write_random_model(path, {"vocab_size": 260, **config})


def prepare(gguf_file: Path) -> PreparedModel:
    return prepare_model(str(gguf_file), gguf_file.parent / "cache")


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_gives_the_original_back(tmp_path: Path, config: dict[str, Any]) -> None:
    source = small(tmp_path / "hf", **config)
    got = prepare(write_gguf(source, tmp_path / "model.gguf"))
    ours, theirs = load_file(got.path / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    config_of = lambda path: DecoderSpec.from_config(json.loads((path / "config.json").read_text()))  # noqa: E731
    assert config_of(got.path) == config_of(source)
    assert (got.served_name, got.vocab_size, got.max_model_len, got.eos_token_ids) == (
        "model",
        260,
        2048,
        (2,),
    )


def test_mistral_comes_as_llama_with_a_window(tmp_path: Path) -> None:
    source = small(tmp_path / "hf", model_type="mistral", sliding_window=8)
    got = prepare(write_gguf(source, tmp_path / "m.gguf", metadata={"llama.attention.sliding_window": 8}))
    assert json.loads((got.path / "config.json").read_text())["model_type"] == "mistral"
    assert torch.equal(
        load_file(got.path / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"],
        load_file(source / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"],
    )


def test_quantized_becomes_bfloat16(tmp_path: Path) -> None:
    source = small(tmp_path / "hf")
    got = prepare(write_gguf(source, tmp_path / "m.gguf", quantization=gguf.GGMLQuantizationType.Q8_0))
    ours, theirs = load_file(got.path / "model.safetensors"), load_file(source / "model.safetensors")
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value, rtol=0.02, atol=0.02 * value.abs().max().item())


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.models.shard_writer.SHARD_BYTES", 100_000)
    source = small(tmp_path / "hf")
    got = prepare(write_gguf(source, tmp_path / "m.gguf"))
    assert (got.path / "model.safetensors.index.json").is_file()
    assert len(list(got.path.glob("model-*-of-*.safetensors"))) > 1
    assert read_headers(got.path).keys() == read_headers(source).keys()
    load_decoder(got.path, torch.float32, torch.device("cpu"))
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(got.path)


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, SCALINGS["linear"]),
        ({"llama.rope.scale_linear": 4.0}, SCALINGS["linear"]),
        ({"llama.rope.scaling.type": "none"}, SCALINGS["default"]),
        (
            {
                "llama.rope.freq_base": 1e6,
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32768,
            },
            SCALINGS["yarn"],
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], scaling: dict[str, Any]) -> None:
    got = prepare(write_gguf(small(tmp_path / "hf"), tmp_path / "m.gguf", metadata=metadata))
    assert json.loads((got.path / "config.json").read_text())["rope_parameters"] == scaling


def test_yarn_attention_factor_is_llama_cpps_times_the_papers(tmp_path: Path) -> None:
    metadata = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": 0.5,
    }
    got = prepare(write_gguf(small(tmp_path / "hf"), tmp_path / "m.gguf", metadata=metadata))
    rope = json.loads((got.path / "config.json").read_text())["rope_parameters"]
    assert rope["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


def test_llama3_scaling_is_found_from_its_divisors(tmp_path: Path) -> None:
    source = small(tmp_path / "hf", head_dim=32, rope_parameters=SCALINGS["llama3"])
    spec = DecoderSpec.from_config(json.loads((source / "config.json").read_text()))
    scaled, _ = inverse_frequencies(spec.rope, 32)
    plain = spec.rope.theta ** (-torch.arange(0, 32, 2) / 32)
    divisors = {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    got = prepare(write_gguf(source, tmp_path / "m.gguf", tensors=divisors))
    assert json.loads((got.path / "config.json").read_text())["rope_parameters"] == SCALINGS["llama3"]
    divisors["rope_freqs.weight"][3] *= 2
    with pytest.raises(ModelError, match="not Llama 3's scaling"):
        prepare(write_gguf(source, tmp_path / "n.gguf", tensors=divisors))


def test_end_tokens(tmp_path: Path) -> None:
    source = small(tmp_path / "hf")
    template = "{{ '<|im_end|>' }}"
    for number, (metadata, expected) in enumerate(
        [
            ({"tokenizer.ggml.eos_token_id": 0}, (0,)),
            ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2}, (0, 2)),
            ({"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": template}, (0, 2)),
            ({"tokenizer.chat_template": template}, (2,)),
        ]
    ):
        got = prepare(write_gguf(source, tmp_path / f"{number}.gguf", metadata=metadata))
        assert got.eos_token_ids == expected


@pytest.mark.parametrize("size", [0, 3, 20, 500, 5_000, 30_000, 100_000])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    whole = write_gguf(small(tmp_path / "hf"), tmp_path / "whole.gguf").read_bytes()
    assert len(whole) > 300_000
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(ModelError, match=r"cut\.gguf is not a whole GGUF file"):
        prepare(tmp_path / "cut.gguf")
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"]


def test_one_byte_short(tmp_path: Path) -> None:
    whole = write_gguf(small(tmp_path / "hf"), tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole.rstrip(b"\0")[:-64])
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        prepare(tmp_path / "cut.gguf")


def test_length_that_leads_out_of_the_file(tmp_path: Path) -> None:
    """The gguf package's own reader would fill the memory with this one."""
    file = write_gguf(small(tmp_path / "hf"), tmp_path / "m.gguf")
    data = bytearray(file.read_bytes())
    key = b"tokenizer.ggml.token_type"
    length_at = data.index(key) + len(key) + 4 + 4  # after the types of the value and of its items
    assert int.from_bytes(data[length_at : length_at + 8], "little") == 260
    data[length_at + 6] = 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="beyond its end"):
        prepare(file)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3' is not supported; supported are llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.block_count": None}, "no metadata llama.block_count"),
        ({"llama.attention.value_length": 8}, "different length"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "'longrope'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "mystery"}, "'mystery' is not known"),
        ({"tokenizer.ggml.pre": None}, "None is not known"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.merges": None}, "no valid merges"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        prepare(write_gguf(small(tmp_path / "hf"), tmp_path / "m.gguf", metadata=metadata))
    assert named in str(raised.value)


def test_unknown_tensor(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    with pytest.raises(ModelError, match=r"blk\.0\.attn_sinks\.weight"):
        prepare(write_gguf(small(tmp_path / "hf"), tmp_path / "m.gguf", tensors=extra))


@pytest.mark.slow
def test_default_model_equals_transformers_import(smollm2: PreparedModel, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = gguf_of_default_model(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2.path))
    # Not from_pretrained(gguf_file=...), which asks for the package accelerate.
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)
    ours = load_file(smollm2.path / "model.safetensors")
    assert theirs["tensors"].keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs["tensors"][name].to(torch.bfloat16)), name
    config = json.loads((smollm2.path / "config.json").read_text())
    for key, value in theirs["config"].items():
        if key in config and isinstance(value, int):
            assert config[key] == value, key


def gguf_of_default_model(directory: Path) -> Path:
    try:
        return default_model.fetch_default_model(directory, lambda message: None)
    except ModelError as error:
        pytest.skip(str(error))
