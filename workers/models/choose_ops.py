"""Which `Ops` a decoder on a device computes with: Triton's where there is a GPU and they give right results."""

from __future__ import annotations

import functools
import logging
import math
import subprocess

import torch
from torch import Tensor

from kernels.attention_step import AttentionStep
from kernels.paged_kv import PagedKv
from workers.models.ops import Ops, torch_ops
from workers.models.rope import RopeTable
from workers.models.rope_spec import RopeSpec

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def choose_ops(kernels: str, device: torch.device, dtype: torch.dtype) -> Ops:
    """`kernels` as in EngineConfig. auto: Triton's on a GPU, eager torch where it has none or they fail, as the log says.

    Raises ValueError for kernels that this device cannot have.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return torch_ops()
    if kernels not in ("auto", "triton"):
        raise ValueError(
            f"engine.kernels is {kernels}, which is for CPUs, but engine.device is {device.type}; use auto"
        )
    found = _tried(device, dtype)
    if isinstance(found, str):
        if kernels == "triton":
            raise ValueError(f"engine.kernels is triton, which cannot be used on {device}: {found}")
        logger.warning(
            "torch computes what Triton's kernels would, more slowly: they cannot be used: %s", found
        )
        return torch_ops()
    return found


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype) -> Ops | str:
    """What Triton compiles, with a C compiler, now or not at all, is tried on a few numbers before it serves."""
    try:
        from triton import knobs
        from triton.errors import TritonError

        from workers.models.triton_ops import triton_ops
    except ImportError as error:
        return str(error)
    if device.type != "cuda" and not knobs.runtime.interpret:
        return "there is no GPU, and TRITON_INTERPRET is not 1"
    try:
        found, wanted = (_results(ops, device, dtype) for ops in (triton_ops(), torch_ops()))
        bound = _TOLERANCE[dtype]
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    except (TritonError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        return str(error)
    return triton_ops()


@torch.inference_mode()
def _results(ops: Ops, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Of each op, on numbers that are the same for all."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # Decode over a context in parts, a chunk of four tokens, one that only fills up. 4 heads of 32 share 2 KV heads.
    tables = torch.zeros(3, 38, dtype=torch.int64)
    tables[0], tables[1, 0] = torch.arange(1, 39), 39
    slots = torch.tensor([8 * 38 + 3, 312, 313, 314, 315, -1])
    step = AttentionStep.of([0, 1, 5, 6], [300, 4, 1], tables, slots, device)
    cache = PagedKv.of(random(40, 2, 2, 2, 8, 32))
    positions = torch.tensor([299, 0, 1, 2, 3, 0], device=device)
    rope = RopeTable(RopeSpec("default", 10000.0), 32, 300, dtype, device)
    attention = ops.attention(cache, step, rope, positions)
    q = attention.rotate_and_write(random(6, 8, 32), 1)
    residual = random(6, 64).float()
    normed = ops.add_rms_norm(residual, random(6, 64), torch.ones(64, device=device), 1e-5, dtype)
    # Each token has two of four experts; hidden 64, inner 32.
    experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)]).to(device)
    matrices = random(4, 64, 64) / 8, random(4, 64, 32) / math.sqrt(32)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    weights = torch.rand(6, 2, generator=generator).to(device)
    summed = ops.experts(normed, weights, experts, *matrices, None, None, counts)
    seen = attention.attend(q, 1, 0.2)[:5]
    return [q, cache.data, seen, residual, normed, ops.silu_mul(random(6, 64)), summed, counts]
