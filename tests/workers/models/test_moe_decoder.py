"""Mixture-of-experts models against transformers on the same random weights, through a paged cache cut into chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.workers.models.test_decoder import BLOCK_SIZE, CPU, Sequence, mixed_steps, step
from workers.models.decoder import load_decoder
from workers.models.layer_weights import SparseMlp
from workers.models.moe import LocalExperts, local_experts
from workers.models.ops import Ops
from workers.models.random_model import write_random_model
from workers.models.spec import DecoderSpec

pytestmark = pytest.mark.usefixtures("one_thread")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral"},
    "mixtral_window": {"model_type": "mixtral", "sliding_window": 9, "num_experts_per_tok": 1},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "qwen2_moe_window": {
        "model_type": "qwen2_moe",
        "qkv_bias": False,
        "use_sliding_window": True,
        "sliding_window": 7,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "qwen3_moe_every_second": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "head_dim": 24,
        "attention_bias": True,
    },
    "olmoe": {"model_type": "olmoe"},
    "deepseek_v2": {"model_type": "deepseek_v2"},
    "deepseek_v2_groups": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 32,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 0,
    },
    "deepseek_v3": {"model_type": "deepseek_v3"},
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "rope_interleave": False,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    },
    "gpt_oss": {"model_type": "gpt_oss"},
    "gpt_oss_yarn": {
        "model_type": "gpt_oss",
        "rope_parameters": {**YARN, "truncate": False},
        "num_hidden_layers": 3,
    },
}


class Recorder:
    """Experts that note for what they were called."""

    def __init__(self) -> None:
        self.chosen: dict[int, list[Tensor]] = {}

    def make(self, index: int, spec: DecoderSpec, weights: SparseMlp[Tensor], ops: Ops) -> Any:
        local, chosen = local_experts(index, spec, weights, ops), self.chosen.setdefault(index, [])

        class Noting:
            def start(self, x: Tensor, weights: Tensor, experts: Tensor) -> Callable[[], Tensor]:
                chosen.append(experts)
                return local.start(x, weights, experts)

        return Noting()


def their_choices(model: torch.nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    chosen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    with torch.no_grad():
        return run(), chosen


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_equals_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    write_random_model(tmp_path, config, seed=5)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    ).eval()
    recorder = Recorder()
    decoder = load_decoder(tmp_path, torch.float32, CPU, make_experts=recorder.make)
    kv_cache = decoder.new_kv_cache(40, BLOCK_SIZE)
    blocks = torch.randperm(40)
    first = Sequence(decoder, kv_cache, torch.randint(0, 259, (41,)), blocks[:11])
    second = Sequence(decoder, kv_cache, torch.randint(0, 259, (30,)), blocks[11:19])
    sparse = [layer for layer in range(decoder.spec.num_layers) if decoder.spec.sparse(layer)]
    ours: dict[Sequence, list[list[Tensor]]] = {first: [], second: []}
    for work in mixed_steps(first, second):
        step(decoder, kv_cache, work)
        steps = [chosen[-1] for _, chosen in sorted(recorder.chosen.items())]
        start = 0
        for sequence, count in work:
            ours[sequence].append([experts[start : start + count] for experts in steps])
            start += count
    assert len(recorder.chosen) == len(sparse) > 0
    for sequence in (first, second):
        ids = sequence._token_ids[None]
        expected, chosen = their_choices(theirs, lambda ids=ids: theirs(ids).logits[0])
        got = torch.cat(sequence.logits)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        for layer in range(len(sparse)):
            choice = torch.cat([at[layer] for at in ours[sequence]])
            assert torch.equal(choice.sort(-1).values, chosen[layer].sort(-1).values)


def local(path: Path) -> LocalExperts:
    decoder = load_decoder(path, torch.float32, CPU)
    experts = decoder._layers[-1].mlp.experts  # type: ignore[attr-defined]
    assert isinstance(experts, LocalExperts)
    return experts


def test_tokens_are_counted_by_expert(tmp_path: Path) -> None:
    write_random_model(tmp_path, {"model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [1]})
    recorder = Recorder()
    decoder = load_decoder(tmp_path, torch.float32, CPU)
    noting = load_decoder(tmp_path, torch.float32, CPU, make_experts=recorder.make)
    for model in (decoder, noting):
        sequence = Sequence(model, model.new_kv_cache(12, BLOCK_SIZE), torch.arange(40), torch.arange(10))
        for count in (17, 1, 20):
            step(model, sequence._kv_cache, [(sequence, count)])
    counts = decoder.expert_counts()
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [38 * 3] * 2
    for index, chosen in recorder.chosen.items():
        assert torch.equal(counts[index], torch.cat(chosen).flatten().bincount(minlength=8))
    assert noting.expert_counts().shape == (0, 0)  # who made the experts counts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_stored_in_one_tensor(tmp_path: Path, family: str) -> None:
    """As transformers' modules hold them."""
    path = write_random_model(tmp_path, family)
    expected = local(path)
    held = load_file(path / "model.safetensors")
    each = [name for name in held if ".experts." in name]
    fused: dict[str, Tensor] = {}
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for layer in {name.split(".experts.")[0] for name in each}:
        gate, up, down = (
            torch.stack([held[f"{layer}.experts.{i}.{name}.weight"] for i in range(8)]) for name in names
        )
        fused[f"{layer}.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        fused[f"{layer}.experts.down_proj"] = down
    renamed = {**{n: t for n, t in held.items() if n not in each}, **fused}
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in renamed.items()}
    save_file(renamed, path / "model.safetensors")
    got = local(path)
    assert torch.equal(got._gate_up, expected._gate_up)
    assert torch.equal(got._down, expected._down)


def test_an_expert_is_read_alone(tmp_path: Path) -> None:
    from workers.models.checkpoint import read_json
    from workers.models.errors import ModelError
    from workers.models.weight_source import WeightSource

    for family in ("qwen2_moe", "gpt_oss"):
        path = write_random_model(tmp_path / family, family)
        source = WeightSource(path, DecoderSpec.from_config(read_json(path / "config.json")))
        whole, expert = local(path), source.expert(1, 5)
        assert torch.equal(expert.gate_up, whole._gate_up[5])  # type: ignore[arg-type]
        assert torch.equal(expert.down, whole._down[5])  # type: ignore[arg-type]
        assert (expert.gate_up_bias is None) == (whole._biases is None)
        with pytest.raises(ModelError, match="layer 1 has experts 0 to 7; asked for was expert 8"):
            source.expert(1, 8)
    path = write_random_model(tmp_path / "v3", "deepseek_v3")
    source = WeightSource(path, DecoderSpec.from_config(read_json(path / "config.json")))
    with pytest.raises(ModelError, match="layer 0 has no experts"):
        source.expert(0, 0)


def test_half_precision_stays_close(tmp_path: Path) -> None:
    """The router is float32 whatever the model is, or tokens near a tie would go elsewhere."""
    for family in ("qwen2_moe", "deepseek_v3", "gpt_oss"):
        path = write_random_model(tmp_path / family, {"model_type": family, "num_hidden_layers": 2})
        exact, half = (load_decoder(path, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
        logits = []
        for model in (exact, half):
            sequence = Sequence(model, model.new_kv_cache(12, BLOCK_SIZE), torch.arange(40), torch.arange(10))
            step(model, sequence._kv_cache, [(sequence, 40)])
            logits.append(sequence.logits[0].log_softmax(-1))
        divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
        assert divergence.median() < 2e-2
