"""FlashInfer's paged decode attention over the very same cache, where that package is installed."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from bench.gpu.timing import Launch
from kernels.attention_step import AttentionStep

_WORKSPACE_BYTES = 256 << 20


def decode(q: Tensor, cache: Tensor, step: AttentionStep) -> Launch | None:
    """None without the package. q [S, heads, dim]; cache [blocks, 2, kv_heads, block, dim], of one layer."""
    if importlib.util.find_spec("flashinfer") is None or not q.is_cuda:
        return None
    flashinfer = importlib.import_module("flashinfer")
    block = cache.shape[3]
    lengths = step.lengths.cpu()
    counts = (lengths + block - 1) // block
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    tables = step.block_tables.cpu()
    ids = torch.cat([tables[s, : int(count)] for s, count in enumerate(counts)]).int()
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        starts.to(q.device),
        ids.to(q.device),
        (lengths - (counts - 1) * block).int().to(q.device),
        q.shape[1],
        cache.shape[2],
        q.shape[2],
        block,
        q_data_type=q.dtype,
        kv_data_type=cache.dtype,
    )
    return lambda: wrapper.run(q, cache)
