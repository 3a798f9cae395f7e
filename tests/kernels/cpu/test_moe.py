"""A layer with experts on the CPU against the oracle on the same values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cpu.build import VARIANTS, runs_here
from kernels.cpu.decoder import ThreadPool
from kernels.cpu.expert_exchange import MissingExpert
from kernels.cpu.experts import ExpertTable
from kernels.cpu.library import Library, load
from kernels.cpu.moe import MoeBlock, route
from kernels.cpu.structures import Format
from kernels.reference_moe import Routing, clamped_swiglu
from kernels.reference_moe import route as reference_route
from tests.kernels.cpu.moe_layers import packed, random_moe

ROUTINGS = {
    "mixtral": Routing(2, normalize=True),
    "olmoe": Routing(8),
    "deepseek-v2": Routing(3, scale=2.5, num_groups=4, top_groups=2),
    "deepseek-v3": Routing(
        4, "sigmoid", normalize=True, scale=2.5, num_groups=4, top_groups=2, group_score="top2_sum"
    ),
    "gpt-oss": Routing(4, softmax_after_topk=True),
    "all": Routing(16),
}
EXPERTS = 16


@pytest.fixture(scope="module")
def library() -> Library:
    return load()


def _tokens(count: int, hidden: int, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, hidden), np.float32)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_routing_is_the_oracle_s(library: Library, name: str, biased: bool) -> None:
    logits = torch.from_numpy(_tokens(50, EXPERTS))
    logits[7] = 1.0  # all equal: the lower index is chosen
    bias = torch.from_numpy(_tokens(1, EXPERTS)[0]) / 4 if biased else None
    wanted_weights, wanted = reference_route(logits, ROUTINGS[name], bias)
    weights, experts = route(library, logits.numpy(), ROUTINGS[name], None if bias is None else bias.numpy())
    assert torch.equal(torch.from_numpy(experts).long(), wanted)
    torch.testing.assert_close(torch.from_numpy(weights), wanted_weights)


@pytest.mark.parametrize("name", ROUTINGS)
def test_nan_chooses_distinct_experts_and_says_so_in_the_weights(library: Library, name: str) -> None:
    logits = np.full((1, EXPERTS), np.nan, np.float32)
    weights, experts = route(library, logits, ROUTINGS[name])
    assert len(set(experts[0].tolist())) == ROUTINGS[name].top_k
    assert np.isnan(weights).all()


def test_a_routing_that_the_experts_do_not_allow_is_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        route(library, _tokens(1, EXPERTS), Routing(1, num_groups=3))


# Of the largest output. Q8 and Q4 round the activations to 8 bits too, twice.
TOLERANCE = {Format.F32: 2e-6, Format.BF16: 0.01, Format.Q8: 0.03, Format.Q4: 0.03}


@pytest.mark.parametrize("format", TOLERANCE, ids=lambda format: format.name)
@pytest.mark.parametrize("name", ["olmoe", "deepseek-v3"])
def test_the_layer_is_the_oracle_s(library: Library, format: Format, name: str) -> None:
    # Widths that do not fill the last panel and depth, where the format has no groups of 32.
    hidden, intermediate, shared = (96, 64, 128) if format in (Format.Q8, Format.Q4) else (72, 40, 88)
    given = random_moe(
        ROUTINGS[name],
        EXPERTS,
        hidden,
        intermediate,
        shared=shared,
        shared_gated=name == "olmoe",
        correction=name == "deepseek-v3",
    )
    native, values = packed(library, given, format)
    block = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=64)
    for count in (0, 1, 5, 64):
        x = _tokens(count, hidden)
        wanted = values(torch.from_numpy(x)).numpy()
        assert np.abs(block(x) - wanted).max(initial=0) <= TOLERANCE[format] * np.abs(wanted).max(initial=1)


@pytest.mark.parametrize("variant", ["portable", "avx2", "amx_soft"])
def test_other_instruction_sets(variant: str) -> None:
    if not runs_here(VARIANTS[variant]):
        pytest.skip(f"this processor cannot run {variant}")
    library = load(variant)
    native, values = packed(library, random_moe(ROUTINGS["mixtral"], EXPERTS, 72, 40, shared=24), Format.BF16)
    x = _tokens(9, 72)
    mine = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=9)(x)
    wanted = values(torch.from_numpy(x)).numpy()
    assert np.abs(mine - wanted).max() <= 0.01 * np.abs(wanted).max()


def test_biases_and_gpt_oss_s_gate(library: Library) -> None:
    gate = partial(clamped_swiglu, alpha=1.702, limit=1.0)  # low enough to bind
    given = random_moe(ROUTINGS["gpt-oss"], EXPERTS, 72, 40, bias=True, activation=gate)
    native, values = packed(library, given, Format.F32, clamped=(1.702, 1.0))
    x = _tokens(20, 72)
    mine = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=20)(x)
    torch.testing.assert_close(torch.from_numpy(mine), values(torch.from_numpy(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", TOLERANCE, ids=lambda format: format.name)
def test_a_token_s_result_does_not_hang_on_its_company(library: Library, format: Format) -> None:
    native, _ = packed(library, random_moe(ROUTINGS["mixtral"], EXPERTS, 96, 64, shared=32), format)
    x = _tokens(1200, 96)  # more than are computed at a time
    together = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=1200)(x)
    alone = MoeBlock(library, ThreadPool(library, 1), native, max_tokens=3)
    for row in (0, 1, 700, 1199):
        assert np.array_equal(alone(x[row : row + 1]), together[row : row + 1])
    assert np.array_equal(alone(x[100:103]), together[100:103])


def test_what_was_chosen_and_computed_is_counted(library: Library) -> None:
    given = random_moe(ROUTINGS["mixtral"], EXPERTS, 64, 32)
    native, _ = packed(library, given, Format.F32)
    block = MoeBlock(library, ThreadPool(library, 2), native, max_tokens=40)
    x = _tokens(40, 64)
    block(x)
    block(x[:10])
    _, chosen = reference_route(torch.from_numpy(x) @ given.router.T, given.routing)
    wanted = torch.bincount(torch.cat((chosen, chosen[:10])).flatten(), minlength=EXPERTS)
    assert block.experts.routed.tolist() == [wanted.tolist()]
    assert block.experts.computed.tolist() == [wanted.tolist()]


def test_experts_may_lie_in_any_slot_and_move_between_steps(library: Library) -> None:
    native, _ = packed(library, random_moe(ROUTINGS["mixtral"], EXPERTS, 64, 32), Format.BF16)
    pool = ThreadPool(library, 2)
    x = _tokens(30, 64)
    wanted = MoeBlock(library, pool, native, max_tokens=30)(x)
    block = MoeBlock(library, pool, native, max_tokens=30, slots=EXPERTS + 3)
    with pytest.raises(MissingExpert, match="is in no slot"):
        block(x)
    places = np.random.default_rng(1).permutation(EXPERTS + 3)[:EXPERTS].astype(np.int32)
    block.experts.set_places(0, places)
    with pytest.raises(MissingExpert, match="has no expert"):
        block(x)
    for expert, slot in enumerate(places.tolist()):
        original = native.experts[expert]
        copies = [array.copy() for array in original.arrays]  # as from another host
        block.experts.set_expert(0, slot, original.with_arrays(copies))
    assert np.array_equal(block(x), wanted)


def test_layers_that_are_not_alike_are_refused(library: Library) -> None:
    routing = ROUTINGS["mixtral"]
    first, _ = packed(library, random_moe(routing, 8, 64, 32, shared=32), Format.F32)
    fewer, _ = packed(library, random_moe(routing, 4, 64, 32, shared=32), Format.F32)
    wider, _ = packed(library, random_moe(routing, 8, 64, 64, shared=32), Format.F32)
    bare, _ = packed(library, random_moe(routing, 8, 64, 32), Format.F32)
    for other in (fewer, wider, bare):
        with pytest.raises(ValueError, match="layer 1: experts of another number or form"):
            ExpertTable([first, other])
    short, _ = packed(library, random_moe(routing, 8, 64, 32, shared=32), Format.BF16)
    with pytest.raises(ValueError, match="layer 0: a shared expert of another format"):
        ExpertTable([replace(first, shared=short.shared)])


def test_a_slot_takes_only_experts_of_the_model_s_form(library: Library) -> None:
    native, _ = packed(library, random_moe(ROUTINGS["mixtral"], EXPERTS, 64, 32), Format.F32)
    other, _ = packed(library, random_moe(ROUTINGS["mixtral"], EXPERTS, 64, 64), Format.F32)
    table = MoeBlock(library, ThreadPool(library, 1), native, max_tokens=1).experts
    with pytest.raises(ValueError, match="another form"):
        table.set_expert(0, 0, other.experts[0])
    with pytest.raises(IndexError, match="slots 0 to 15"):
        table.set_expert(0, 16, native.experts[0])
    with pytest.raises(ValueError, match="made of arrays"):
        native.experts[0].with_arrays(other.experts[0].arrays)
