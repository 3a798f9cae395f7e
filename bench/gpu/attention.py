"""Paged attention: what share of the copy bandwidth decode reaches, and of the matmul rate prefill; SDPA beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.timing import Case, Launch
from kernels.attention_step import AttentionStep
from kernels.reference_relayout import Wire
from kernels.triton.attention import Tiling, paged_attention
from kernels.triton.paged_kv import PagedKv


@dataclass(frozen=True)
class Sizes:
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    block: int = 16
    layers: int = 4  # a block holds them all, so that those of one layer lie apart as they do in a model

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


FULL, TINY = Sizes(), Sizes(4, 2, 16, 4, 2)
DECODES = ((1, 1024), (16, 1024), (64, 1024), (256, 1024), (64, 4096))  # sequences, context


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    sizes = TINY if tiny else FULL
    for seqs, length in ((2, 24),) if tiny else DECODES:
        yield _case("decode attention", [(length, 1)] * seqs, sizes, device, None)
    largest = (2, 24) if tiny else (64, 4096)
    for wire in ("int8", "fp8"):
        yield _case("decode attention", [(largest[1], 1)] * largest[0], sizes, device, wire)
    prompt = 12 if tiny else 8192
    yield _case("prefill attention", [(prompt, prompt)], sizes, device, None)
    yield _case("prefill attention", [(prompt, prompt // 4)], sizes, device, None)
    some = [(20, 1)] * 2 if tiny else [(1024, 1)] * 63
    yield _case("mixed attention", [*some, (prompt // 2, prompt // 4)], sizes, device, None)


def _case(
    name: str, seqs: list[tuple[int, int]], sizes: Sizes, device: torch.device, wire: Wire | None
) -> Case:
    """Of (context, queries) each."""
    step, cache = _step(seqs, sizes, device), _cache(seqs, sizes, device, wire)
    tokens = sum(queries for _, queries in seqs)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(tokens, sizes.heads, sizes.dim, device=device, dtype=dtype)
    layer = sizes.layers - 1
    forms: dict[str, Launch] = {"headrace": lambda: paged_attention(q, cache, layer, step, sizes.dim**-0.5)}
    decode = step.max_queries == 1
    if decode and wire is None:
        chosen = Tiling.choose(sizes.group, sizes.kv_heads, len(seqs), 1, step.max_length, sizes.dim, 2)
        for keys, split, warps in ((32, 512, 4), (64, 512, 4), (128, 512, 4), (64, 1024, 4), (64, 512, 2)):
            tiling = replace(chosen, keys=keys, parts=16, least=split, warps=warps)
            forms[f"headrace, {keys} keys, parts of {split}, {warps} warps"] = _with(
                q, cache, layer, step, sizes, tiling
            )
    if decode or len(seqs) == 1:
        forms["torch sdpa, contiguous cache"] = _sdpa(seqs, sizes, q, device)
    row = sizes.dim * 2 if wire is None else sizes.dim + 4
    context = sum(length for length, _ in seqs)
    pairs = sum(queries * (length - queries) + queries * (queries + 1) // 2 for length, queries in seqs)
    return Case(
        name,
        {"sequences": len(seqs), "context": max(seqs)[0], "queries": tokens, "cache": wire or str(dtype)[6:]},
        forms,
        needed_bytes=2 * context * sizes.kv_heads * row + 2 * q.nbytes,
        flops=4 * pairs * sizes.heads * sizes.dim,
        ceiling="copy" if decode else "matmul",
    )


def _with(q: Tensor, cache: PagedKv, layer: int, step: AttentionStep, sizes: Sizes, tiling: Tiling) -> Launch:
    return lambda: paged_attention(q, cache, layer, step, sizes.dim**-0.5, tiling=tiling)


def _step(seqs: list[tuple[int, int]], sizes: Sizes, device: torch.device) -> AttentionStep:
    """Blocks in random order."""
    needed = [-(-length // sizes.block) for length, _ in seqs]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).split(needed)
    tables = torch.zeros(len(seqs), max(needed), dtype=torch.int64)
    starts = [0]
    for s, blocks in enumerate(order):
        tables[s, : len(blocks)] = blocks
        starts.append(starts[-1] + seqs[s][1])
    slots = torch.zeros(starts[-1], dtype=torch.int64)  # nothing is written here
    return AttentionStep.of(starts, [length for length, _ in seqs], tables, slots, device)


def _cache(seqs: list[tuple[int, int]], sizes: Sizes, device: torch.device, wire: Wire | None) -> PagedKv:
    blocks = sum(-(-length // sizes.block) for length, _ in seqs)
    shape = (blocks, sizes.layers, 2, sizes.kv_heads)
    if wire is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return PagedKv.of(torch.randn(*shape, sizes.block, sizes.dim, device=device, dtype=dtype))
    bytes_of_tile = sizes.block * (sizes.dim + 4)
    tiles = torch.randint(0, 100, (*shape, bytes_of_tile), device=device, dtype=torch.uint8)
    tiles.view(torch.float32)[..., sizes.block * sizes.dim // 4 :] = 0.02  # the scales
    return PagedKv.of_tiles(tiles, sizes.block, sizes.dim, wire)


def _sdpa(seqs: list[tuple[int, int]], sizes: Sizes, q: Tensor, device: torch.device) -> Launch:
    """On a cache that lies as SDPA likes it best: what paging costs is not in it."""
    length, queries = seqs[0]
    shape = (len(seqs), sizes.kv_heads, length, sizes.dim)
    k, v = (torch.randn(shape, device=device, dtype=q.dtype) for _ in range(2))
    rows = q.view(len(seqs), queries, sizes.heads, sizes.dim).transpose(1, 2).contiguous()
    mask = None
    if 1 < queries < length:
        mask = torch.ones(queries, length, dtype=torch.bool, device=device).tril_(length - queries)
    causal = queries == length
    return lambda: functional.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )
