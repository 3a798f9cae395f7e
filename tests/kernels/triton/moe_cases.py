"""What test_triton.py runs in a process of its own: under Triton's interpreter, or on the GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import reference_moe as reference
from kernels.quantized_experts import ExpertStack
from kernels.reference import silu_mul
from kernels.reference_moe import Routing, clamped_swiglu
from kernels.triton.moe import fused_experts
from kernels.triton.moe_align import align
from kernels.triton.moe_route import route
from tests.kernels.triton.matmul_cases import quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as if its bits were whole numbers (triton 3.6): numpy has no such type.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
ROUTINGS = {
    "mixtral": Routing(2, normalize=True),
    "olmoe": Routing(8),
    "deepseek-v2": Routing(3, scale=2.5, num_groups=4, top_groups=2),
    "deepseek-v3": Routing(
        3, "sigmoid", normalize=True, scale=2.5, num_groups=4, top_groups=2, group_score="top2_sum"
    ),
    "gpt-oss": Routing(4, softmax_after_topk=True),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))
    return (values / shape[-1] ** 0.5).to(DEVICE)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("experts", [12, 16])
@pytest.mark.parametrize("biased", [False, True])
def test_routing(name: str, experts: int, biased: bool) -> None:
    logits = normal(11, experts, seed=experts) * 4
    logits[3] = 0.5  # all equal
    bias = normal(experts) if biased else None
    wanted_weights, wanted = reference.route(logits, ROUTINGS[name], bias)
    weights, chosen = route(logits, ROUTINGS[name], bias)
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(weights, wanted_weights)


def test_tokens_that_only_fill_up_go_to_nobody() -> None:
    logits = normal(6, 12) * 4
    logits[4] = torch.nan
    slots = torch.tensor([3, -1, 0, 9, -1, 2], device=DEVICE)
    wanted_weights, wanted = reference.route(logits, ROUTINGS["deepseek-v3"])
    weights, chosen = route(logits, ROUTINGS["deepseek-v3"], None, slots)
    assert torch.equal(chosen[slots >= 0], wanted[slots >= 0])
    torch.testing.assert_close(weights[slots >= 0], wanted_weights[slots >= 0])
    assert (chosen[slots < 0] == 12).all()
    assert not weights[slots < 0].any()


def test_no_tokens() -> None:
    weights, chosen = route(normal(0, 8), Routing(2))
    assert weights.shape == chosen.shape == (0, 2)
    assert fused_experts(normal(0, 8), weights, chosen, normal(8, 12, 8), normal(8, 8, 6)).shape == (0, 8)


@pytest.mark.parametrize(
    "experts",
    [
        [[0, 1]],
        [[5, 5], [5, 5], [5, 0]],
        [[i % 6, 3] for i in range(200)],
        [[6, 6], [2, 1], [6, 6]],
        [[6, 6]],
    ],
)
def test_blocks_are_of_one_expert(experts: list[list[int]]) -> None:
    """Of six; what is given to a seventh is given to nobody."""
    flat = torch.tensor(experts, device=DEVICE)
    given = torch.arange(6, device=DEVICE)
    blocks = align(flat, 6, 4, given)
    rows = blocks.rows.view(-1, 4).tolist()
    seen = [a for row in rows for a in row if a < flat.numel()]
    assert sorted(seen) == [a for a, expert in enumerate(flat.flatten().tolist()) if expert < 6]
    assert torch.equal(given, torch.arange(6, device=DEVICE) + flat.flatten().bincount(minlength=7)[:6])
    for expert, row in zip(blocks.experts.tolist(), rows, strict=True):
        assert all(flat.flatten()[a] == expert for a in row if a < flat.numel())
        assert expert == 6 or row[0] < flat.numel()  # no block of nothing but filling


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "gpt-oss"])
def test_experts(tokens: int, dtype: torch.dtype, form: str) -> None:
    hidden, inner, experts, routing = 72, 40, 6, Routing(3, normalize=True)  # widths that fill no tile
    x, gate_up, down = (
        normal(tokens, hidden) * 8,
        normal(experts, 2 * inner, hidden),
        normal(experts, hidden, inner),
    )
    biases = (
        (normal(experts, 2 * inner, seed=4), normal(experts, hidden, seed=5)) if form == "gpt-oss" else None
    )
    clamped = (1.702, 1.0) if form == "gpt-oss" else None
    x, gate_up, down = (value.to(dtype) for value in (x, gate_up, down))
    weights, chosen = reference.route(normal(tokens, experts, seed=9) * 4, routing)
    nobody = torch.full((2, 3), experts, device=DEVICE)  # whose rows are not computed, whatever they hold
    mine = fused_experts(
        torch.cat((x, torch.full_like(x[:1], torch.nan).expand(2, -1))),
        torch.cat((weights, torch.zeros_like(weights[:1]).expand(2, -1))),
        torch.cat((chosen, nobody)), gate_up, down, biases, clamped,
    )  # fmt: skip
    assert not mine[tokens:].any()
    mine = mine[:tokens]

    order, counts = reference.permute(chosen, experts)
    gate = silu_mul if clamped is None else partial(clamped_swiglu, alpha=clamped[0], limit=clamped[1])
    exact = (value.float() for value in (gate_up, down))
    y = reference.grouped_mlp(x.float()[order // routing.top_k], counts, *exact, biases, gate)
    wanted = reference.combine(y, order, weights)
    assert mine.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert (mine - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    ("format", "group"), [("int8", 0), ("int8", 32), ("int4", 64), ("int4", 32), ("fp8", 0), ("fp8", 128)]
)
def test_quantized_experts(format: str, group: int) -> None:
    """Against the same values as floats; experts of 96 inputs, which fill no tile."""
    hidden, inner, experts, tokens, routing = 192, 96, 5, 7, Routing(2, normalize=True)
    if group == 64:
        inner = 128
    gate_up, down = ExpertStack(experts), ExpertStack(experts)
    for expert in range(experts):
        for stack, n, k in ((gate_up, 2 * inner, hidden), (down, hidden, inner)):
            part = quantized(format, n, k, k if group == 128 and k % 128 else group)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(expert)).to(DEVICE)
            stack.put(expert, replace(part, dtype=torch.float32).picked(order))
    given = gate_up.whole(), down.whole()
    x = normal(tokens, hidden)
    weights, chosen = reference.route(normal(tokens, experts, seed=9) * 4, routing)
    mine = fused_experts(x, weights, chosen, *given)
    floats = [torch.stack([matrices[expert] for expert in range(experts)]) for matrices in given]
    order, counts = reference.permute(chosen, experts)
    wanted = reference.combine(reference.grouped_mlp(x[order // 2], counts, *floats), order, weights)
    assert (mine - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_what_does_not_go_together_is_refused() -> None:
    chosen = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="do not go together"):
        fused_experts(normal(2, 8), normal(2, 1), chosen, normal(4, 12, 8), normal(4, 8, 5))
    with pytest.raises(ValueError, match="one dtype"):
        fused_experts(normal(2, 8).bfloat16(), normal(2, 1), chosen, normal(4, 12, 8), normal(4, 8, 6))
