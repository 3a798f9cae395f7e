"""The oracle of mixture-of-experts layers, in eager torch: route, permute, grouped MLP, combine.

A layer is: logits = router(x); weights, experts = route(logits); the tokens are sorted by expert, each expert's MLP runs
on its tokens at once, and a token's k results are summed by their weights, always in the order `route` gave them, so
that the sum does not depend on where an expert was computed.

T tokens, k experts each, E experts, N = T * k assignments, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantized_experts import Experts
from kernels.reference import silu_mul

Activation = Callable[[Tensor], Tensor]  # [N, 2 * I], gate first -> [N, I]


@dataclass(frozen=True, slots=True)
class Routing:
    """How logits become experts and their weights. Raises ValueError when its fields contradict one another.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE: softmax, then top-k, `normalize` as the model says. GPT-OSS: top-k of the
    logits, then softmax over those (`softmax_after_topk`). DeepSeek-V2: softmax, groups scored by their best expert
    ("max"). DeepSeek-V3 (arXiv 2412.19437, §2.1.2): sigmoid, a correction bias that takes part in the choice but not in
    the weights, groups scored by the sum of their two best ("top2_sum").
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False  # the k weights sum to 1, before `scale`
    scale: float = 1.0
    num_groups: int = 1  # experts in equal groups of neighbours, of which only `top_groups` are eligible
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    softmax_after_topk: bool = False

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring is {self.scoring!r}; allowed: 'softmax', 'sigmoid'")
        if self.group_score not in ("max", "top2_sum"):
            raise ValueError(f"group_score is {self.group_score!r}; allowed: 'max', 'top2_sum'")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups is {self.top_groups}; allowed: 1 to num_groups ({self.num_groups})")
        if self.softmax_after_topk and (self.scoring != "softmax" or self.normalize):
            raise ValueError(
                "softmax_after_topk needs scoring 'softmax' and normalize false: such weights sum to 1"
            )

    def validate(self, num_experts: int) -> None:
        """Raises ValueError unless a layer of `num_experts` can be routed so."""
        if num_experts % self.num_groups != 0:
            raise ValueError(f"{num_experts} experts do not divide into {self.num_groups} groups")
        each = num_experts // self.num_groups
        if self.top_k > self.top_groups * each:
            raise ValueError(
                f"top_k is {self.top_k}, but {self.top_groups} groups hold {self.top_groups * each} experts"
            )
        if self.num_groups > 1 and self.group_score == "top2_sum" and each < 2:
            raise ValueError(f"group_score 'top2_sum' needs two experts in a group, but it holds {each}")


def route(logits: Tensor, routing: Routing, correction_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose k experts per token: (weights float32 [T, k], experts int64 [T, k]), best first, equals by lower index.

    logits float32 [T, E]; correction_bias float32 [E], added to the scores for the choice only.
    """
    if routing.softmax_after_topk:
        scores = logits
    else:
        scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if routing.top_groups < routing.num_groups:
        choice = _within_best_groups(choice, routing)
    experts = _best(choice, routing.top_k)
    weights = scores.gather(1, experts)
    if routing.softmax_after_topk:
        weights = weights.softmax(-1)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, experts


def _within_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    groups = choice.view(len(choice), routing.num_groups, choice.shape[1] // routing.num_groups)
    score = groups.amax(-1) if routing.group_score == "max" else groups.topk(2, -1).values.sum(-1)
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, _best(score, routing.top_groups), True)
    return groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest in each row, largest first; torch.topk leaves open which of equal ones it takes."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


class Permutation(NamedTuple):
    """Assignments sorted by expert, those of one expert in the order of tokens.

    Assignment a = token * k + j is a token's j-th expert; `x[order // k]` are the inputs in sorted order.
    """

    order: Tensor  # int64 [N] assignment of each sorted row
    counts: Tensor  # int64 [E] rows of each expert


def permute(experts: Tensor, num_experts: int) -> Permutation:
    """experts int64 [T, k], each in 0 .. num_experts - 1."""
    flat = experts.flatten()
    return Permutation(flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts))


def clamped_swiglu(gate_up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """GPT-OSS's gate: [..., 2 * I], gate first -> (up + 1) * gate * sigmoid(alpha * gate), both clamped at `limit`.

    The published weights interleave gate and up; they are taken apart when they are loaded.
    """
    gate, up = gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def grouped_mlp(
    x_sorted: Tensor,
    counts: Tensor,
    gate_up: Experts,
    down: Experts,
    biases: tuple[Tensor, Tensor] | None = None,
    activation: Activation = silu_mul,
) -> Tensor:
    """Each expert's gated MLP on its own rows: [N, H], in x's dtype.

    x_sorted [N, H], rows of expert 0 first, those of nobody last, which become zeros; counts int64 [E]; gate_up [E, 2 * I, H], gate first; down [E, H, I];
    biases: ([E, 2 * I], [E, H]).
    """
    out = torch.empty_like(x_sorted)
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        if count == 0:
            continue
        rows = slice(begin, begin + count)
        begin += count
        bias = (None, None) if biases is None else (biases[0][expert], biases[1][expert])
        inner = activation(functional.linear(x_sorted[rows], gate_up[expert], bias[0]))
        out[rows] = functional.linear(inner, down[expert], bias[1])
    out[begin:] = 0.0
    return out


def combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's k results, in float32 and in the order of `weights`: float32 [T, H].

    y [N, H] in sorted order, order int64 [N], weights float32 [T, k].
    """
    tokens, k = weights.shape
    results = torch.empty(tokens * k, y.shape[1], dtype=torch.float32, device=y.device)
    results[order] = y.float()
    results = results.view(tokens, k, y.shape[1])
    total = results[:, 0] * weights[:, :1]
    for j in range(1, k):
        total = total + results[:, j] * weights[:, j : j + 1]
    return total
