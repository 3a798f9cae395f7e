"""Paged attention: what share of the copy bandwidth decode reaches, and of the matmul rate prefill.

Beside it torch's SDPA on a cache that lies contiguous, and FlashInfer on the paged one where it is installed. Launches in
a graph are bounded by the longest context that a model takes, so decode is also measured with such a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu import flashinfer
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
    values: int | None = None  # latents: so many first dimensions of a row are its value, there is one plane
    bound: int = 16384  # tokens of context that a captured launch is ready for
    layers: int = 4  # a block holds them all, so that those of one layer lie apart as they do in a model

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def planes(self) -> int:
        return 2 if self.values is None else 1


FULL, TINY = Sizes(), Sizes(4, 2, 16, 4, bound=64, layers=2)
LATENTS, TINY_LATENTS = Sizes(128, 1, 576, values=512), Sizes(4, 1, 24, 4, values=16, bound=64, layers=2)
DECODES = ((1, 1024), (16, 1024), (64, 1024), (256, 1024), (64, 4096))  # sequences, context


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    sizes = TINY if tiny else FULL
    for seqs, length in ((2, 24),) if tiny else DECODES:
        yield _case("decode attention", [(length, 1)] * seqs, sizes, device, None)
    largest = (2, 24) if tiny else (64, 4096)
    for wire in ("int8", "fp8"):
        yield _case("decode attention", [(largest[1], 1)] * largest[0], sizes, device, wire)
    yield _case(
        "latent decode attention",
        [(largest[1], 1)] * largest[0],
        TINY_LATENTS if tiny else LATENTS,
        device,
        None,
    )
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
    scale, values = sizes.dim**-0.5, sizes.values

    def ours(step: AttentionStep = step, tiling: Tiling | None = None) -> Launch:
        return lambda: paged_attention(q, cache, layer, step, scale, values=values, tiling=tiling)

    forms = {"headrace": ours()}
    decode, plain = step.max_queries == 1, wire is None and values is None
    if decode:
        forms[f"headrace, in a graph for contexts up to {sizes.bound}"] = ours(
            replace(step, max_length=sizes.bound)
        )
    if decode and plain:
        chosen = Tiling.choose(sizes.group, sizes.kv_heads, len(seqs), 1, step.max_length, sizes.dim, 2)
        for keys, least, warps in ((32, 512, 4), (64, 512, 4), (128, 512, 4), (64, 1024, 4), (64, 512, 2)):
            tiling = replace(chosen, keys=keys, parts=16, least=least, warps=warps)
            forms[f"headrace, {keys} keys, parts of {least} at least, {warps} warps"] = ours(tiling=tiling)
        if (peer := flashinfer.decode(q, cache.data[:, layer].contiguous(), step)) is not None:
            forms["FlashInfer"] = peer
    if plain and (decode or len(seqs) == 1):
        forms["torch sdpa, contiguous cache"] = _sdpa(seqs, sizes, q, device)
    row = sizes.dim * 2 if wire is None else sizes.dim + 4
    context = sum(length for length, _ in seqs)
    pairs = sum(queries * (length - queries) + queries * (queries + 1) // 2 for length, queries in seqs)
    return Case(
        name,
        {"sequences": len(seqs), "context": max(seqs)[0], "queries": tokens, "cache": wire or str(dtype)[6:]},
        forms,
        needed_bytes=sizes.planes * context * sizes.kv_heads * row + 2 * q.nbytes,
        flops=2 * pairs * sizes.heads * (sizes.dim + (sizes.values or sizes.dim)),
        ceiling="copy" if decode else "matmul",
    )


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
    shape = (blocks, sizes.layers, sizes.planes, sizes.kv_heads)
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
