"""Which experts each token goes to: kernels.reference_moe.route on a GPU, in one launch.

A program has some tokens and all their logits in registers. Scores are computed as the reference does, the k best are
taken one after another, equals by lower index.
"""

# Triton has no types: neither its decorator nor the arguments of kernels.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference_moe import Routing

_TOKENS = 4  # of a program


def route(
    logits: Tensor, routing: Routing, correction_bias: Tensor | None = None, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E], correction_bias float32 [E] -> weights float32 [T, k], experts int64 [T, k].

    slots int64 [T]: a token whose slot is below 0 is given to nobody, its experts are E, its weights 0. Raises ValueError where so many experts cannot be routed so.
    """
    tokens, experts = logits.shape
    routing.validate(experts)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, routing.top_k, dtype=torch.int64, device=logits.device)
    if not tokens:
        return weights, chosen
    _route[(triton.cdiv(tokens, _TOKENS),)](
        logits.contiguous(),
        logits if correction_bias is None else correction_bias.contiguous(),
        chosen if slots is None else slots,
        weights,
        chosen,
        tokens,
        experts,
        routing.scale,
        TOP_K=routing.top_k,
        SIGMOID=routing.scoring == "sigmoid",
        SOFTMAX_AFTER=routing.softmax_after_topk,
        NORMALIZE=routing.normalize,
        BIASED=correction_bias is not None,
        SLOTS=slots is not None,
        GROUPS=routing.num_groups,
        TOP_GROUPS=routing.top_groups,
        TOP2_SUM=routing.group_score == "top2_sum",
        EXPERTS=triton.next_power_of_2(experts),
        TOKENS=_TOKENS,
    )
    return weights, chosen


@triton.jit
def _first_of_largest(scores, column, EXPERTS: tl.constexpr):
    """The lowest column of the largest score of each row: [TOKENS]. A row of NaN has its first."""
    largest = tl.max(scores, axis=1)
    place = tl.min(tl.where(scores == largest[:, None], column[None, :], EXPERTS), axis=1)
    return tl.where(place < EXPERTS, place, 0)


@triton.jit
def _best_groups(
    choice, column, num_experts,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2_SUM: tl.constexpr,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`choice` with -inf for the experts of all but the best groups."""
    group = column // (num_experts // GROUPS)
    score = tl.full((TOKENS, EXPERTS), float("-inf"), tl.float32)  # of each group, at its number's column
    for g in tl.static_range(GROUPS):
        of_group = tl.where((group == g)[None, :], choice, float("-inf"))
        total = tl.max(of_group, axis=1)
        if TOP2_SUM:
            first = _first_of_largest(of_group, column, EXPERTS)
            total += tl.max(tl.where(column[None, :] == first[:, None], float("-inf"), of_group), axis=1)
        score = tl.where((column == g)[None, :], total[:, None], score)
    kept = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = _first_of_largest(score, column, EXPERTS)
        kept = tl.where(group[None, :] == best[:, None], 1, kept)
        score = tl.where(column[None, :] == best[:, None], float("-inf"), score)
    return tl.where(kept == 1, choice, float("-inf"))


@triton.jit
def _route(
    logits, bias, slots, weights, chosen, num_tokens, num_experts, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, NORMALIZE: tl.constexpr,
    BIASED: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, EXPERTS)
    real = column < num_experts
    here = token < num_tokens
    somebody = here
    if SLOTS:
        somebody = tl.load(slots + token, mask=here, other=-1) >= 0
    place = token[:, None] * num_experts + column[None, :]
    scores = tl.load(logits + place, mask=here[:, None] & real[None, :], other=float("-inf"))
    scores = tl.where(somebody[:, None], scores, 0.0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-scores))
    elif not SOFTMAX_AFTER:
        scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        scores = scores / tl.sum(scores, axis=1)[:, None]
    choice = scores
    if BIASED:
        choice = scores + tl.load(bias + column, mask=real, other=0.0)[None, :]
    choice = tl.where(real[None, :], choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        choice = _best_groups(choice, column, num_experts, GROUPS, TOP_GROUPS, TOP2_SUM, EXPERTS, TOKENS)
    slot = tl.arange(0, triton.next_power_of_2(TOP_K))
    taken = tl.full((TOKENS, triton.next_power_of_2(TOP_K)), float("-inf"), tl.float32)
    for j in tl.static_range(TOP_K):
        best = _first_of_largest(choice, column, EXPERTS)
        is_best = column[None, :] == best[:, None]
        choice = tl.where(is_best, float("-inf"), choice)
        weight = tl.sum(tl.where(is_best, scores, 0.0), axis=1)
        taken = tl.where(slot[None, :] == j, weight[:, None], taken)
        best = tl.where(somebody, best, num_experts)
        tl.store(chosen + token * TOP_K + j, best.to(tl.int64), mask=here)
    used = (slot < TOP_K)[None, :]
    if SOFTMAX_AFTER:
        taken = tl.exp(taken - tl.max(taken, axis=1)[:, None])
        taken = taken / tl.sum(tl.where(used, taken, 0.0), axis=1)[:, None]
    if NORMALIZE:
        taken = taken / (tl.sum(tl.where(used, taken, 0.0), axis=1)[:, None] + 1e-20)
    taken = tl.where(somebody[:, None], taken * scale, 0.0)
    tl.store(weights + token[:, None] * TOP_K + slot[None, :], taken, mask=here[:, None] & used)
