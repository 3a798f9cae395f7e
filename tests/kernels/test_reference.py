"""The reference ops against the formulas they stand for, in float64 where rounding is in question."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.paged_kv import PagedKv

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("shape", [(1, 8), (3, 576), (5, 4, 24), (0, 16)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(reference.rms_norm(x, weight, 1e-5), expected, dtype)


def test_rms_norm_is_computed_in_float32() -> None:
    # 300^2 is beyond float16: squaring in the input's dtype would give 0.
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    torch.testing.assert_close(
        reference.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x)
    )


@dtypes
def test_rms_norm_with_a_weight_per_head(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 3, 16).to(dtype), torch.randn(3, 16).to(dtype)
    got = reference.rms_norm(x, weight, 1e-6)
    for head in range(3):
        close(got[:, head], reference.rms_norm(x[:, head], weight[head], 1e-6).double(), dtype)


@dtypes
@pytest.mark.parametrize("inner", [1, 7, 128])
def test_silu_mul(dtype: torch.dtype, inner: int) -> None:
    gate_up = torch.randn(5, 2 * inner).to(dtype)
    gate, up = gate_up.double().split(inner, -1)
    close(reference.silu_mul(gate_up.clone()), gate * torch.sigmoid(gate) * up, dtype)


@dtypes
@pytest.mark.parametrize("whole", [False, True], ids=["half_table", "whole_table"])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 16), (9, 12, 64)])
def test_apply_rope_rotates_pairs(dtype: torch.dtype, whole: bool, tokens: int, heads: int, dim: int) -> None:
    x = torch.randn(tokens, heads, dim).to(dtype)
    angle = torch.rand(tokens, dim // 2) * 6
    pairs = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1))
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    cos, sin = angle.cos(), angle.sin()
    if whole:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    close(reference.apply_rope(x, cos, sin), expected, dtype)


def test_write_kv_touches_its_slots_only() -> None:
    cache = torch.zeros(6, 3, 2, 2, 4, 8)
    slots = torch.tensor([5, 0, 23, 14])
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    reference.write_kv(cache, 1, k, v, slots)
    expected = torch.zeros_like(cache)
    for token, slot in enumerate(slots.tolist()):
        expected[slot // 4, 1, 0, :, slot % 4] = k[token]
        expected[slot // 4, 1, 1, :, slot % 4] = v[token]
    assert torch.equal(cache, expected)


def test_plan_writes_what_write_kv_writes() -> None:
    one, other = torch.zeros(6, 3, 2, 2, 4, 8), torch.zeros(6, 3, 2, 2, 4, 8)
    slots = torch.tensor([5, 0, 23, 14])
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    step = reference.AttentionStep.of([0, 4], [4], torch.zeros(1, 1, dtype=torch.int64), slots)
    plan = reference.AttentionPlan(step, PagedKv.of(other))
    for layer in range(3):
        reference.write_kv(one, layer, k + layer, v - layer, slots)
        plan.write(layer, k + layer, v - layer)
    assert torch.equal(one, other)


def test_blocks_travel_whole() -> None:
    cache = torch.randn(6, 3, 2, 2, 4, 8)
    taken = reference.gather_blocks(cache, torch.tensor([4, 1]))
    assert taken.is_contiguous()
    assert torch.equal(taken, cache[[4, 1]])
    other = torch.zeros(9, 3, 2, 2, 4, 8)
    reference.scatter_blocks(other, torch.tensor([0, 7]), taken)
    assert torch.equal(other[[0, 7]], taken)
    assert not other[[1, 2, 3, 4, 5, 6, 8]].any()
