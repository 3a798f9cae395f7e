"""An up-cycled model says what the dense one says, and shows it when a token goes to the wrong expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cluster.cli import app
from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, Sequence, step
from workers.models.checkpoint import INDEX_NAME
from workers.models.decoder import Decoder, load_decoder
from workers.models.errors import ModelError
from workers.models.layer_weights import SparseMlp
from workers.models.moe import local_experts
from workers.models.ops import Ops
from workers.models.random_model import write_random_model
from workers.models.spec import DecoderSpec
from workers.models.upcycle import Upcycling, upcycle

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(0, 259, (40,), generator=torch.Generator().manual_seed(2))


def logits(decoder: Decoder) -> Tensor:
    sequence = Sequence(decoder, decoder.new_kv_cache(12, BLOCK_SIZE), IDS, torch.arange(10))
    for count in (25, 1, 14):
        step(decoder, sequence._kv_cache, [(sequence, count)])
    return torch.cat(sequence.logits)


def load(path: Path, **options: Any) -> Decoder:
    return load_decoder(path, torch.float32, CPU, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("dense"), {"tie_word_embeddings": True}, seed=4)


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upcycle(dense, tmp_path_factory.mktemp("sparse") / "new", Upcycling(groups=3, slices=4))


@pytest.mark.parametrize(
    "how", [Upcycling(8, 1), Upcycling(4, 2, noise=0.5, seed=1), Upcycling(8, 4)], ids=str
)
@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"model_type": "mistral", "sliding_window": 9},
        {"model_type": "qwen3", "head_dim": 24},
    ],
    ids=["llama", "mistral", "qwen3"],
)
def test_the_output_is_the_dense_models(tmp_path: Path, config: dict[str, Any], how: Upcycling) -> None:
    source = write_random_model(tmp_path / "dense", config, seed=4)
    target = upcycle(source, tmp_path / "sparse", how)
    decoder = load(target)
    assert decoder.spec.moe is not None
    assert (decoder.spec.moe.num_experts, decoder.spec.moe.top_k) == (how.num_experts, how.slices)
    expected, got = logits(load(source)), logits(decoder)
    assert (got - expected).abs().max() < 3e-6 * expected.abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - expected).abs().max() < 3e-6 * expected.abs().max()


def test_a_token_at_the_wrong_expert_shows(dense: Path, sparse: Path) -> None:
    def misrouting(index: int, spec: DecoderSpec, weights: SparseMlp[Tensor], ops: Ops) -> Any:
        local = local_experts(index, spec, weights, ops)

        class Misrouted:
            def start(self, x: Tensor, weights: Tensor, experts: Tensor) -> Callable[[], Tensor]:
                if len(x) == 25:  # the step with token 7
                    experts = experts.clone()
                    experts[7, 0] = (experts[7, 0] + 4) % 12  # the same slice of the next group
                return local.start(x, weights, experts)

        return Misrouted()

    right, wrong = logits(load(sparse)), logits(load(sparse, make_experts=misrouting))
    assert (wrong[7] - right[7]).abs().max() > 0.1
    assert torch.equal(wrong[:7], right[:7])


def test_all_groups_are_used_and_noise_makes_them_uneven(dense: Path, tmp_path: Path) -> None:
    unevenness = []
    for noise in (0.0, 2.0):
        decoder = load(upcycle(dense, tmp_path / str(noise), Upcycling(8, 2, noise=noise)))
        logits(decoder)
        counts = decoder.expert_counts().view(2, 8, 2)
        assert torch.equal(counts[..., 0], counts[..., 1]), "a group's experts are taken together"
        unevenness.append(float(counts.max(1).values.sum() / counts.float().mean(1).sum()))
        if not noise:
            assert (counts.sum(0)[:, 0] > 0).all()
    assert unevenness[1] > 1.3 * unevenness[0]


def test_what_is_written(dense: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (sparse / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    monkeypatch.setattr("workers.models.shard_writer.SHARD_BYTES", 100_000)
    again = upcycle(dense, tmp_path / "shards", Upcycling(groups=3, slices=4))
    monkeypatch.undo()
    files = sorted(set(json.loads((again / INDEX_NAME).read_text())["weight_map"].values()))
    assert len(files) > 2
    whole = load_file(sparse / "model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(again / file).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    half = upcycle(dense, tmp_path / "half", Upcycling(3, 4, dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    other = load_file(upcycle(dense, tmp_path / "seed", Upcycling(3, 4, seed=1)) / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    assert not torch.equal(other[name], whole[name])


def test_what_cannot_be_up_cycled_is_told(dense: Path, sparse: Path, tmp_path: Path) -> None:
    cases = [
        (dense, {"slices": 3}, "an MLP of 128 neurons cannot be cut into 3 equal slices"),
        (dense, {"groups": 0}, "groups and slices must be at least 1, not 0 groups of 2"),
        (dense, {"noise": float("nan")}, "noise must be a number of at least 0, not nan"),
        (dense, {"dtype": "int8"}, "dtype 'int8' is not known; allowed are source"),
        (sparse, {}, "a mixtral model cannot be up-cycled; those of llama"),
        (write_random_model(tmp_path / "q", "qwen2"), {}, "a qwen2 model"),
        (write_random_model(tmp_path / "b", {"mlp_bias": True}), {}, "biases"),
    ]
    for source, how, says in cases:
        with pytest.raises(ModelError, match=says):
            upcycle(source, tmp_path / "new", Upcycling(**{"groups": 2, "slices": 2, **how}))
        assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(ModelError, match="exists already"):
        upcycle(dense, tmp_path / "full", Upcycling(2, 2))
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


def test_the_command(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    done = CliRunner().invoke(app, ["upcycle", str(dense), str(target), "--groups", "3", "--slices", "2"])
    assert done.exit_code == 0, done.output
    assert "6 experts in each layer, a token takes 2" in done.output
    assert (logits(load(target)) - logits(load(dense))).abs().max() < 1e-3
    failed = CliRunner().invoke(app, ["upcycle", str(dense), str(target), "--slices", "5"])
    assert failed.exit_code == 1
    assert "cannot be cut into 5 equal slices" in failed.output
