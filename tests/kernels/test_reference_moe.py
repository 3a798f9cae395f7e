"""The oracle of MoE layers against transformers' own blocks, tiny and random."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from kernels.reference_moe import Routing, clamped_swiglu, combine, grouped_mlp, permute, route

HIDDEN, EXPERTS, TOKENS = 32, 16, 37

QWEN2 = Qwen2MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=False)
QWEN3 = Qwen3MoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=True)
OLMOE = OlmoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=8, norm_topk_prob=False)
MIXTRAL = MixtralConfig(
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    hidden_act="silu",
)
DEEPSEEK = {
    "hidden_size": HIDDEN,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
GREEDY = DeepseekV2Config(**DEEPSEEK, topk_method="greedy")
GROUPED = DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy")
V3 = DeepseekV3Config(**DEEPSEEK, norm_topk_prob=True)
GPT_OSS = GptOssConfig(
    hidden_size=HIDDEN, intermediate_size=48, num_local_experts=EXPERTS, num_experts_per_tok=4
)

ROUTERS = {
    "mixtral": (MixtralTopKRouter, MIXTRAL, Routing(2, normalize=True)),
    "qwen2": (Qwen2MoeTopKRouter, QWEN2, Routing(4)),
    "qwen3": (Qwen3MoeTopKRouter, QWEN3, Routing(4, normalize=True)),
    "olmoe": (OlmoeTopKRouter, OLMOE, Routing(8)),
    "deepseek-v2": (DeepseekV2TopkRouter, GREEDY, Routing(4, scale=2.5)),
    "deepseek-v2-groups": (DeepseekV2TopkRouter, GROUPED, Routing(4, scale=2.5, num_groups=4, top_groups=2)),
    "deepseek-v3": (
        DeepseekV3TopkRouter,
        V3,
        Routing(4, "sigmoid", normalize=True, scale=2.5, num_groups=4, top_groups=2, group_score="top2_sum"),
    ),
    "gpt-oss": (GptOssTopKRouter, GPT_OSS, Routing(4, softmax_after_topk=True)),
}


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("name", ROUTERS)
def test_route_is_that_of_transformers(name: str) -> None:
    make, config, routing = ROUTERS[name]
    generator = torch.Generator().manual_seed(len(name))
    router: Any = make(config)
    _randomize(router, generator)
    logits, wanted_weights, wanted_experts = router(torch.randn(TOKENS, HIDDEN, generator=generator))
    weights, experts = route(logits.float(), routing, getattr(router, "e_score_correction_bias", None))

    assert weights.dtype == torch.float32
    assert experts.dtype == torch.int64
    assert torch.equal(experts.sort(-1).values, wanted_experts.sort(-1).values)
    torch.testing.assert_close(_dense(weights, experts), _dense(wanted_weights, wanted_experts))


def _dense(weights: Tensor, experts: Tensor) -> Tensor:
    return torch.zeros(len(weights), EXPERTS).scatter_(1, experts, weights.float())


def test_of_equal_scores_the_lower_index_is_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert route(logits, Routing(2))[1].tolist() == [[1, 2], [0, 1]]


def _block(x: Tensor, weights: Tensor, experts: Tensor, *mlp: Any) -> Tensor:
    order, counts = permute(experts, EXPERTS)
    y = grouped_mlp(x[order // experts.shape[1]], counts, *mlp)
    return combine(y, order, weights)


def test_the_block_is_mixtral_s() -> None:
    generator = torch.Generator().manual_seed(1)
    experts_module = MixtralExperts(MIXTRAL)
    _randomize(experts_module, generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights, experts = route(torch.randn(TOKENS, EXPERTS, generator=generator), Routing(2, normalize=True))
    wanted = experts_module(x, experts, weights)
    mine = _block(x, weights, experts, experts_module.gate_up_proj, experts_module.down_proj)
    torch.testing.assert_close(mine, wanted)


def test_the_block_with_biases_and_a_clamped_gate_is_gpt_oss_s() -> None:
    generator = torch.Generator().manual_seed(2)
    module = GptOssExperts(GPT_OSS)
    _randomize(module, generator)
    x = 5 * torch.randn(TOKENS, HIDDEN, generator=generator)  # large enough for the clamp to bind
    weights, experts = route(
        torch.randn(TOKENS, EXPERTS, generator=generator), Routing(4, softmax_after_topk=True)
    )
    wanted = module(x, experts, weights)

    split = torch.cat((torch.arange(0, 96, 2), torch.arange(1, 96, 2)))  # interleaved gate and up, apart
    gate_up, down = module.gate_up_proj.mT[:, split], module.down_proj.mT
    biases = (module.gate_up_proj_bias[:, split], module.down_proj_bias)
    gate = partial(clamped_swiglu, alpha=GPT_OSS.swiglu_alpha, limit=GPT_OSS.swiglu_limit)
    torch.testing.assert_close(_block(x, weights, experts, gate_up, down, biases, gate), wanted)


def test_no_tokens() -> None:
    weights, experts = route(torch.empty(0, EXPERTS), Routing(2))
    gate_up, down = torch.zeros(EXPERTS, 8, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 4)
    assert _block(torch.empty(0, HIDDEN), weights, experts, gate_up, down).shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1, "scoring": "tanh"}, "scoring is 'tanh'"),
        ({"top_k": 1, "top_groups": 3, "num_groups": 2}, "top_groups is 3"),
        ({"top_k": 1, "softmax_after_topk": True, "normalize": True}, "softmax_after_topk"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Routing(**fields)


def test_what_a_number_of_experts_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        Routing(1, num_groups=3).validate(16)
    with pytest.raises(ValueError, match="groups hold 4 experts"):
        Routing(5, num_groups=4).validate(16)
