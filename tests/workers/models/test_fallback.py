"""Families that DecoderSpec cannot express run through transformers over our KV cache, with its greedy tokens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.e2e.oracle import Oracle
from tests.workers.models.tiny_fallback import FAMILIES, MORE_FAMILIES, write_fallback_model
from tests.workers.worker_pair import worker_pair
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.models.catalog import prepare_model
from workers.models.errors import ModelError
from workers.models.fallback import FallbackModel, load_fallback
from workers.models.fallback_attention import Step
from workers.models.fallback_capture import first_wait
from workers.models.fallback_spec import FallbackSpec, read_spec
from workers.models.random_model import write_random_model
from workers.protocol.messages import Sampling

GREEDY = Sampling(max_tokens=12, seed=1, temperature=0.0, ignore_eos=True, logprobs=3)
START = list(range(3, 40))
PROMPTS = [[*START, 99, 98], [*START, 97], list(range(200, 140, -1)), [5, 6, 7], [40] * 20]
each_family = pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)]
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**engine: Any) -> EngineConfig:
    given = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "block_size": 8, "num_threads": 1}
    return EngineConfig(**(given | {"max_num_seqs": 8, "max_num_batched_tokens": 24} | engine))


def opened(path: Path, **engine: Any) -> Engine:
    return Engine(settings(**engine), prepare_model(str(path)))


def edit(path: Path, **values: Any) -> Path:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return path


@torch.inference_mode()
def check(engine: Engine, oracle: Oracle, prompts: list[list[int]]) -> None:
    """Greedy tokens and the best log-probabilities are those of one pass of transformers' own attention."""
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert len(answer.tokens) == GREEDY.max_tokens
        assert oracle.fault(prompt, answer.tokens) is None
        logits = oracle.model(torch.tensor([prompt + answer.tokens[:-1]])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)
        for row, given in enumerate(answer.logprobs):
            for token, logprob in given.top:
                assert logprob == pytest.approx(float(expected[row, token]), abs=2e-3)


@each_family
def test_the_engine_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    """Prompts in chunks beside decoded tokens, so few blocks that requests are preempted, then prefix hits."""
    path = write_fallback_model(tmp_path / family, family)
    oracle = Oracle(path)
    engine = opened(path, num_blocks=14)
    assert (engine.runner.kernels, engine.runner.weights) == ("transformers", "float32")
    check(engine, oracle, PROMPTS)
    assert engine.scheduler.preemptions > 0
    check(engine, oracle, [PROMPTS[2]])
    assert engine.scheduler.hit_tokens > 0
    assert engine.pool.num_referenced == 0


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fallback_model(tmp_path_factory.mktemp("models") / "gemma2", "gemma2", seed=1)


def test_what_the_catalog_says(gemma2: Path) -> None:
    model = prepare_model(str(gemma2))
    assert (model.max_model_len, model.vocab_size, model.eos_token_ids) == (256, 259, (2,))
    (gemma2 / "generation_config.json").unlink()
    assert prepare_model(str(gemma2)).eos_token_ids == (2,)


def test_it_is_said_once_and_with_the_reason(gemma2: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(gemma2)
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("Gemma2ForCausalLM runs through transformers")
    assert "architecture 'gemma2' is not supported" in said


def test_an_option_that_the_decoder_lacks_is_enough(tmp_path: Path) -> None:
    path = edit(write_random_model(tmp_path / "gelu", "llama", seed=2), hidden_act="gelu")
    engine = opened(path)
    assert engine.runner.kernels == "transformers"
    check(engine, Oracle(path), PROMPTS[:2])


def test_several_rows_of_a_request_in_one_step(gemma2: Path) -> None:
    engine = opened(gemma2, speculation={"method": "ngram", "ngram_min": 1})
    check(engine, Oracle(gemma2), [[7, 8, 9] * 9, PROMPTS[0]])
    assert engine.scheduler.drafted_tokens > 0


@pytest.mark.parametrize(
    ("given", "held", "bound"),
    [
        ({"dtype": "bfloat16"}, "bfloat16", 0.1),
        ({"kv_cache_dtype": "int8"}, "int8", 0.02),
        ({"kv_cache_dtype": "fp8"}, "fp8", 0.1),
    ],
)
def test_what_is_rounded_stays_close(gemma2: Path, given: dict[str, str], held: str, bound: float) -> None:
    engine = opened(gemma2, **given)
    assert engine.layout.dtype == held
    prompt = PROMPTS[2]
    [answer] = engine.generate([prompt], GREEDY)
    with torch.inference_mode():
        logits = Oracle(gemma2).model(torch.tensor([prompt + answer.tokens[:-1]])).logits[0]
    expected = logits[len(prompt) - 1 :].log_softmax(-1)
    off = [
        abs(new.top[0][1] - float(expected[row, new.top[0][0]])) for row, new in enumerate(answer.logprobs)
    ]
    assert 0 < sum(off) / len(off) < bound


def test_between_a_prefill_and_a_decode_worker(gemma2: Path) -> None:
    prompt = list(range(3, 100))
    with worker_pair(gemma2, settings(block_size=16, max_num_batched_tokens=40), "shm") as pair:
        tokens, done = pair.generate(prompt, max_tokens=12)
        assert done.transfer_bytes == 7 * pair.decode.info.layout.block_bytes
        assert pair.decode.info.device == "cpu (transformers)"
    assert Oracle(gemma2).fault(prompt, tokens) is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"quantization": "int8"},
            "engine.quantization int8 cannot be had: gemma2 runs through transformers",
        ),
        ({"quantization": "stored"}, "engine.quantization stored"),
        ({"kernels": "portable"}, "engine.kernels portable"),
    ],
)
def test_settings_that_transformers_cannot_have(gemma2: Path, given: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        opened(gemma2, **given)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bloom"}, "bloom places tokens by ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "falcon places tokens by ALiBi"),
        (
            {"model_type": "falcon"},
            "attention of falcon does not go through transformers' attention interface",
        ),
        ({"model_type": "mamba"}, "mamba keeps a recurrent state"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "lfm2 has layers of conv"),
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model for vit"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "gpt2 has cross-attention"),
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]},
            "is of Gemma2ForSequ",
        ),
        ({"model_type": "gemma2", "quantization_config": {"quant_method": "gptq"}}, "weights are quantized"),
        ({"model_type": "gemma2", "num_hidden_layers": "two"}, "num_hidden_layers"),
        (
            {"model_type": "gemma2", "max_position_embeddings": 0},
            "context length: max_position_embeddings is 0",
        ),
        ({"model_type": "made_up"}, "does not know model_type 'made_up'"),
        ({"model_type": "made_up", "auto_map": {"AutoConfig": "code.C"}}, "auto_map"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_what_is_refused_by_its_config(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    with pytest.raises(ModelError) as raised:
        read_spec(tmp_path)
    assert named in str(raised.value)
    assert f"architecture {config['model_type']!r} is not supported" in str(raised.value)


@pytest.mark.parametrize(
    ("family", "values", "named"),
    [
        ("bert", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}, "neither causal nor"),
        # It counts its positions itself, from the first token of a step.
        ("bart", {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}, "in chunks"),
    ],
)
def test_what_is_refused_by_trying_it(
    tmp_path: Path, family: str, values: dict[str, Any], named: str
) -> None:
    small = {"max_position_embeddings": 64, "intermediate_size": 48, "decoder_ffn_dim": 48}
    path = write_fallback_model(tmp_path / family, family, **{"pad_token_id": 0, **small, **values})
    with pytest.raises(ModelError, match=named):
        opened(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_attention_is_noticed_when_the_model_is_loaded(
    gemma2: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Step.attend

    def without_cap(self: Step, *given: Any) -> torch.Tensor:
        return right(self, *given[:-1], dataclasses.replace(given[-1], softcap=None))

    monkeypatch.setattr(Step, "attend", without_cap)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM does not compute in chunks"):
        opened(gemma2, dtype=dtype)


def test_weights_that_are_missing_are_not_made_up(gemma2: Path, tmp_path: Path) -> None:
    path = edit(shutil.copytree(gemma2, tmp_path / "more"), num_hidden_layers=3, layer_types=None)
    with pytest.raises(ModelError, match=r"lacks \d+ weights of Gemma2ForCausalLM, such as model.layers.2"):
        opened(path)


def test_code_in_a_model_directory_is_not_executed(gemma2: Path, tmp_path: Path) -> None:
    path = edit(
        shutil.copytree(gemma2, tmp_path / "own"),
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert opened(path).runner.kernels == "transformers"
    with pytest.raises(ModelError, match="code of its own"):
        prepare_model(str(edit(path, model_type="own")))
    assert not (tmp_path / "executed").exists()


def test_longrope_ends_the_context_where_it_would_turn_cached_keys(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = {
        "model_type": "phi3",
        **{key: value for key, value in FAMILIES["phi3"].items() if key != "sliding_window"},
        "vocab_size": 259,
        "original_max_position_embeddings": 64,
        "rope_scaling": rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    assert isinstance(spec, FallbackSpec)
    assert (spec.max_position, spec.named_position) == (64, 256)


def loaded(path: Path) -> FallbackModel:
    spec = read_spec(path)
    assert isinstance(spec, FallbackSpec)
    return load_fallback(path, spec, torch.float32, torch.device("cpu"))


@each_family
def test_a_step_does_not_wait_for_the_device(family: str, tmp_path: Path) -> None:
    assert first_wait(loaded(write_fallback_model(tmp_path / family, family))) is None


class Interfering(nn.Module):
    def __init__(self, inner: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._inner, self._act = inner, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._act(self._inner(x))
        return found


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda x: x * float(x.max()), "_local_scalar_dense"),
        (lambda x: x if (x > 0).all() else -x, "_local_scalar_dense"),
        (lambda x: x + x[x > 0].sum(), "index.Tensor by a mask"),
        (lambda x: x + len(x.nonzero()), "nonzero"),
        (lambda x: x.to("meta"), "between cpu and meta"),
        (lambda x: x + x.new_zeros(2).repeat_interleave(torch.tensor([1, 2])).sum(), "repeat_interleave"),
    ],
)
def test_what_waits_for_the_device_is_found(
    gemma2: Path, act: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    model = loaded(gemma2)
    model.module.model.layers[1].mlp = Interfering(model.module.model.layers[1].mlp, act)
    found = first_wait(model)
    assert found is not None
    assert named in found
