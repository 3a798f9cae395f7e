"""The experts of a layer in a few launches on a GPU, where Triton can be had and gives right results."""

from __future__ import annotations

import functools
import logging
import math
import subprocess
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.reference import silu_mul
from kernels.reference_moe import clamped_swiglu, combine, grouped_mlp, permute

logger = logging.getLogger(__name__)

# (x, weights, experts, gate_up, down, biases) -> float32 [T, H]; shapes as in kernels.triton.moe.fused_experts
FusedExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None], Tensor]
Clamp = tuple[float, float] | None  # alpha and limit of GPT-OSS's gate; None: silu

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def plain_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    clamp: Clamp = None,
) -> Tensor:
    """The same in eager torch, expert by expert."""
    gate = silu_mul if clamp is None else partial(clamped_swiglu, alpha=clamp[0], limit=clamp[1])
    order, counts = permute(experts, len(gate_up))
    rows = x.index_select(0, order // experts.shape[1])
    return combine(grouped_mlp(rows, counts, gate_up, down, biases, gate), order, weights)


def fused_experts_on(
    device: torch.device, dtype: torch.dtype, biased: bool, clamp: Clamp
) -> FusedExperts | None:
    """None: there is no GPU, or none that Triton serves; why is in the log."""
    return _triton_experts(device, dtype, biased, clamp) if device.type == "cuda" else None


@functools.cache
def _triton_experts(
    device: torch.device, dtype: torch.dtype, biased: bool, clamp: Clamp
) -> FusedExperts | None:
    try:
        from triton.errors import TritonError

        from kernels.triton.moe import fused_experts
    except ImportError as error:
        _tell(error)
        return None
    try:
        found = partial(fused_experts, clamped=clamp)
        # Triton compiles now, with a C compiler, or not at all; and what it compiled is tried before it serves.
        given = _sample(device, dtype, biased)
        torch.testing.assert_close(
            found(*given),
            plain_experts(*given, clamp),
            rtol=_TOLERANCE[dtype],
            atol=_TOLERANCE[dtype],
        )
        return found
    except (TritonError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        _tell(error)
        return None


def _tell(error: Exception) -> None:
    logger.warning("experts are computed by torch, which is slower: Triton can't be used: %s", error)


def _sample(
    device: torch.device, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """9 tokens, 2 of 4 experts each; hidden 64, inner 32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(device, dtype)

    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)]).to(device)
    weights = torch.rand(9, 2, generator=generator).to(device)
    x, gate_up, down = random(9, 64) * 8, random(4, 64, 64), random(4, 64, 32)
    return x, weights, experts, gate_up, down, (random(4, 64), random(4, 64)) if biased else None
