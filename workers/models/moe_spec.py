"""What the sparse layers of a mixture-of-experts decoder are made of, read from config.json. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workers.models.config_values import ConfigValues
from workers.models.errors import ModelError

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]
Activation = Literal["silu", "clamped_swiglu"]


@dataclass(frozen=True)
class MoeSpec:
    """Routed experts, of which each token takes `top_k`, and shared ones that every token takes.

    The routing fields mean what they mean in `kernels.reference_moe.Routing`.
    """

    layers: tuple[bool, ...]  # whether each layer of the model is sparse; the others have the dense MLP
    num_experts: int  # routed, of one layer
    top_k: int
    intermediate_size: int  # of one routed expert
    scoring: Scoring = "softmax"
    normalize: bool = False  # the chosen weights sum to `scale`
    scale: float = 1.0
    num_groups: int = 1  # of consecutive experts; a token's experts are of its best `top_groups`
    top_groups: int = 1
    group_score: GroupScore = "max"
    softmax_after_topk: bool = False
    correction_bias: bool = False  # added to the scores to choose by, not to weigh by
    router_bias: bool = False
    shared_intermediate_size: int = 0  # of the shared experts together, which are one MLP; 0: there are none
    shared_gate: bool = False  # the shared MLP's output is scaled by a sigmoid gate
    expert_bias: bool = False
    activation: Activation = "silu"
    swiglu_alpha: float = 1.702  # clamped_swiglu
    swiglu_limit: float = 7.0  # clamped_swiglu

    def __post_init__(self) -> None:
        experts = f"{self.num_experts} experts"
        if self.num_experts % self.num_groups:
            raise ModelError(f"{experts} cannot be cut into {self.num_groups} equal groups")
        if self.top_groups > self.num_groups:
            raise ModelError(
                f"a token cannot choose among {self.top_groups} of {self.num_groups} groups of experts"
            )
        if self.group_score == "top2_sum" and self.num_experts // self.num_groups < 2:
            raise ModelError(
                f"groups are scored by their two best, but {self.num_groups} groups of {experts} have one"
            )
        choice = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > choice:
            raise ModelError(
                f"a token cannot take {self.top_k} of the {choice} experts that it may choose among"
            )


def read_moe(model_type: str, config: ConfigValues, num_layers: int) -> MoeSpec | None:
    """None for a dense architecture. Raises ModelError. Defaults are those of transformers."""
    reader = _READERS.get(model_type)
    return None if reader is None else reader(config, num_layers)


def _mixtral(config: ConfigValues, num_layers: int) -> MoeSpec:
    return MoeSpec(
        layers=(True,) * num_layers,
        num_experts=config.first_integer("num_local_experts", "num_experts", default=8),
        top_k=config.integer("num_experts_per_tok", 2),
        intermediate_size=config.integer("intermediate_size"),
        normalize=True,
    )


def _qwen2_moe(config: ConfigValues, num_layers: int) -> MoeSpec:
    return MoeSpec(
        layers=_qwen_layers(config, num_layers),
        num_experts=config.first_integer("num_experts", "num_local_experts", default=60),
        top_k=config.integer("num_experts_per_tok", 4),
        intermediate_size=config.integer("moe_intermediate_size", 1408),
        normalize=config.flag("norm_topk_prob"),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )


def _qwen3_moe(config: ConfigValues, num_layers: int) -> MoeSpec:
    return MoeSpec(
        layers=_qwen_layers(config, num_layers),
        # num_experts in the released checkpoints, num_local_experts as transformers 5 writes it.
        num_experts=config.first_integer("num_experts", "num_local_experts", default=128),
        top_k=config.integer("num_experts_per_tok", 8),
        intermediate_size=config.integer("moe_intermediate_size", 768),
        normalize=config.flag("norm_topk_prob"),
    )


def _olmoe(config: ConfigValues, num_layers: int) -> MoeSpec:
    config.only("clip_qkv")
    return MoeSpec(
        layers=(True,) * num_layers,
        num_experts=config.first_integer("num_experts", "num_local_experts", default=64),
        top_k=config.integer("num_experts_per_tok", 8),
        intermediate_size=config.integer("intermediate_size"),
        normalize=config.flag("norm_topk_prob"),
    )


def _deepseek_v2(config: ConfigValues, num_layers: int) -> MoeSpec:
    config.only("scoring_func", "softmax")
    # transformers ignores it, DeepSeek's own code heeds it: no checkpoint is known that sets it.
    config.only("norm_topk_prob", False)
    config.only("topk_method", "greedy", "group_limited_greedy")
    grouped = config.values.get("topk_method") == "group_limited_greedy"
    width = config.integer("moe_intermediate_size", 1407)
    return MoeSpec(
        layers=_after_first(config, num_layers, default=0),
        num_experts=config.integer("n_routed_experts", 64),
        top_k=config.integer("num_experts_per_tok"),
        intermediate_size=width,
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.integer("n_group") if grouped else 1,
        top_groups=config.integer("topk_group") if grouped else 1,
        shared_intermediate_size=width * config.integer("n_shared_experts", 2),
    )


def _deepseek_v3(config: ConfigValues, num_layers: int) -> MoeSpec:
    config.only("scoring_func", "sigmoid")
    config.only("topk_method", "noaux_tc")
    width = config.integer("moe_intermediate_size", 2048)
    return MoeSpec(
        layers=_after_first(config, num_layers, default=3),
        num_experts=config.integer("n_routed_experts", 256),
        top_k=config.integer("num_experts_per_tok", 8),
        intermediate_size=width,
        scoring="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        num_groups=config.integer("n_group", 8),
        top_groups=config.integer("topk_group", 4),
        group_score="top2_sum",
        correction_bias=True,
        shared_intermediate_size=width * config.integer("n_shared_experts", 1),
    )


def _gpt_oss(config: ConfigValues, num_layers: int) -> MoeSpec:
    return MoeSpec(
        layers=(True,) * num_layers,
        num_experts=config.first_integer("num_local_experts", "num_experts", default=128),
        top_k=config.first_integer("num_experts_per_tok", "experts_per_token", default=4),
        intermediate_size=config.integer("intermediate_size"),
        softmax_after_topk=True,
        router_bias=True,
        expert_bias=True,
        activation="clamped_swiglu",
        swiglu_alpha=config.number("swiglu_alpha", 1.702),
        swiglu_limit=config.number("swiglu_limit", 7.0),
    )


def _qwen_layers(config: ConfigValues, num_layers: int) -> tuple[bool, ...]:
    step = config.integer("decoder_sparse_step", 1)
    dense = config.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise ModelError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _after_first(config: ConfigValues, num_layers: int, default: int) -> tuple[bool, ...]:
    config.only("moe_layer_freq", 1)
    first = config.integer("first_k_dense_replace", default, least=0)
    return tuple(layer >= first for layer in range(num_layers))


_READERS: dict[str, Callable[[ConfigValues, int], MoeSpec]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
