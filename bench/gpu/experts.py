"""The experts of one layer, at the widths of Qwen3-30B-A3B and Mixtral 8x7B; torch's grouped product beside them.

Every expert that somebody takes is read once at least. Tokens are held against the copy bandwidth while few of them share
an expert, and against the bf16 matmul rate beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.timing import Case, Launch
from kernels import reference
from kernels.reference_moe import combine, permute
from kernels.triton.moe import fused_experts

_MEMORY_BOUND_ROWS = 64  # of an expert


@dataclass(frozen=True)
class Sizes:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


FULL = (Sizes("Qwen3-30B-A3B", 128, 8, 2048, 768), Sizes("Mixtral 8x7B", 8, 2, 4096, 14336))
TINY = (Sizes("tiny", 4, 2, 32, 16),)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for sizes in TINY if tiny else FULL:
        gate_up, down = (
            torch.randn(sizes.experts, *shape, device=device).mul_(0.02).to(dtype)
            for shape in ((2 * sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
        )
        for tokens in (3,) if tiny else (1, 64, 256, 4096):
            yield _case(sizes, tokens, gate_up, down)


def _case(sizes: Sizes, tokens: int, gate_up: Tensor, down: Tensor) -> Case:
    x = torch.randn(tokens, sizes.hidden, device=down.device).to(down.dtype)
    scores = torch.randn(tokens, sizes.experts, device=down.device)
    weights, experts = scores.softmax(-1).topk(sizes.top_k)
    taken = len(experts.unique())
    rows = tokens * sizes.top_k
    return Case(
        "experts",
        {"model": sizes.name, "tokens": tokens, "experts taken": taken},
        {
            "headrace": lambda: fused_experts(x, weights, experts, gate_up, down),
            "torch grouped_mm": _grouped(x, weights, experts, gate_up, down),
        },
        needed_bytes=taken * (gate_up[0].nbytes + down[0].nbytes) + 3 * x.nbytes,
        flops=6 * rows * sizes.hidden * sizes.inner,
        ceiling="copy" if rows <= _MEMORY_BOUND_ROWS * taken else "matmul",
    )


def _grouped(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Launch:
    """Rows sorted by expert, two grouped products, sorted back: as transformers' fastest way."""
    top_k, multiply = experts.shape[1], getattr(functional, "grouped_mm", torch._grouped_mm)

    def launch() -> Tensor:
        order, counts = permute(experts, len(down))
        ends = counts.cumsum(0).int()
        inner = reference.silu_mul(multiply(x[order // top_k], gate_up.transpose(1, 2), offs=ends))
        return combine(multiply(inner, down.transpose(1, 2), offs=ends), order, weights)

    return launch
