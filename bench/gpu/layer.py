"""A layer's small kernels: share of the copy bandwidth, eager torch beside them. Llama-3-8B's widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu.timing import Case
from kernels import reference
from kernels.triton.norms import add_rms_norm, silu_mul
from kernels.triton.paged_kv import PagedKv
from kernels.triton.rope_kv import rotate_and_write


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for tokens in (2,) if tiny else (1, 64, 256, 8192):
        yield _norm(tokens, 48 if tiny else 4096, dtype, device)
        yield _gate(tokens, 40 if tiny else 14336, dtype, device)
        yield _rotation(tokens, *(4, 2, 16) if tiny else (32, 8, 128), dtype, device)


def _norm(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    residual = torch.randn(tokens, width, device=device)
    added = torch.randn(tokens, width, device=device, dtype=dtype) * 1e-3
    weight = torch.ones(width, device=device)

    def eager() -> object:
        return reference.rms_norm(residual.add_(added), weight, 1e-5).to(dtype)

    return Case(
        "residual + RMSNorm",
        {"tokens": tokens, "width": width},
        {"headrace": lambda: add_rms_norm(residual, added, weight, 1e-5, dtype), "torch": eager},
        needed_bytes=2 * residual.nbytes + 2 * added.nbytes,
    )


def _gate(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    both = torch.randn(tokens, 2 * width, device=device, dtype=dtype)
    return Case(
        "SiLU gate",
        {"tokens": tokens, "width": width},
        {"headrace": lambda: silu_mul(both), "torch": lambda: reference.silu_mul(both)},
        needed_bytes=both.nbytes * 3 // 2,
    )


def _rotation(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Case:
    size = 16
    blocks = -(-tokens // size)
    cache = torch.zeros(blocks, 2, 2, kv_heads, size, dim, device=device, dtype=dtype)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
    slots = positions = torch.arange(tokens, device=device)
    turn = torch.arange(tokens, device=device)[:, None] * 0.9 ** torch.arange(dim // 2, device=device)
    cos, sin = turn.cos(), turn.sin()
    held = PagedKv.of(cache)

    def eager() -> object:
        qk = reference.apply_rope(qkv[:, :-kv_heads], cos, sin)
        reference.write_kv(cache, 1, qk[:, heads:], qkv[:, -kv_heads:], slots)
        return qk

    return Case(
        "rotation + KV write",
        {"tokens": tokens, "heads": heads, "kv_heads": kv_heads},
        {
            "headrace": lambda: rotate_and_write(qkv, heads, held, 1, slots, positions, cos, sin),
            "torch": eager,
        },
        needed_bytes=2 * qkv.nbytes,
    )
