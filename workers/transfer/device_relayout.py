"""Blocks between a cache on a device and one buffer on that device, in the wire's form: Triton on GPUs, else torch."""

from __future__ import annotations

import logging
import subprocess
from typing import Protocol

import torch

from kernels import reference_relayout
from workers.protocol.messages import Compression

logger = logging.getLogger(__name__)


class Relayout(Protocol):
    """`cache` [num_blocks, num_layers, 2, heads, tokens, head_dim], of any strides; `wire` uint8 [bytes]. What is asked
    is queued on the current stream. Raises ValueError for a cache of a dtype that is not compressed."""

    def gather(
        self, wire: torch.Tensor, cache: torch.Tensor, ids: torch.Tensor, compression: Compression
    ) -> None: ...

    def scatter(
        self, cache: torch.Tensor, ids: torch.Tensor, wire: torch.Tensor, compression: Compression
    ) -> None: ...


@torch.inference_mode()
def relayout_for(cache: torch.Tensor) -> Relayout:
    """For that cache, which nobody uses yet."""
    if cache.device.type != "cuda":
        return _Torch()
    try:
        found = _Triton()
        with torch.cuda.device(cache.device):
            # Its first block is copied out and back: Triton compiles now, with a C compiler, or not at all.
            wire = torch.empty(cache[0].nbytes, dtype=torch.uint8, device=cache.device)
            first = torch.zeros(1, dtype=torch.int64, device=cache.device)
            found.gather(wire, cache, first, "none")
            found.scatter(cache, first, wire, "none")
        return found
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        logger.warning("KV blocks leave the GPU by torch, which is slower: Triton can't be used: %s", error)
        return _Torch()


class _Torch:
    def gather(
        self, wire: torch.Tensor, cache: torch.Tensor, ids: torch.Tensor, compression: Compression
    ) -> None:
        if compression == "none":
            torch.index_select(cache, 0, ids, out=_blocks_in(wire, cache, len(ids)))
        else:
            _check_dtype(cache)
            blocks = cache.index_select(0, ids)
            wire.copy_(reference_relayout.compress(blocks, compression).view(-1))

    def scatter(
        self, cache: torch.Tensor, ids: torch.Tensor, wire: torch.Tensor, compression: Compression
    ) -> None:
        if compression == "none":
            blocks = _blocks_in(wire, cache, len(ids))
        else:
            _check_dtype(cache)
            tiles = wire.view(len(ids), *cache.shape[1:4], -1)
            blocks = reference_relayout.restore(tiles, cache.shape[4], cache.dtype, compression)
        cache.index_copy_(0, ids, blocks)


class _Triton:
    def __init__(self) -> None:
        """Raises ImportError."""
        from kernels.triton import relayout

        self._relayout = relayout

    def gather(
        self, wire: torch.Tensor, cache: torch.Tensor, ids: torch.Tensor, compression: Compression
    ) -> None:
        if compression == "none":
            self._relayout.gather(cache, ids, out=_blocks_in(wire, cache, len(ids)))
        else:
            out = wire.view(len(ids), *cache.shape[1:4], -1)
            self._relayout.gather(cache, ids, wire=compression, out=out)

    def scatter(
        self, cache: torch.Tensor, ids: torch.Tensor, wire: torch.Tensor, compression: Compression
    ) -> None:
        if compression == "none":
            self._relayout.scatter(cache, ids, _blocks_in(wire, cache, len(ids)))
        else:
            tiles = wire.view(len(ids), *cache.shape[1:4], -1)
            self._relayout.scatter(cache, ids, tiles, wire=compression)


def _blocks_in(wire: torch.Tensor, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    return wire.view(cache.dtype).view(num_blocks, *cache.shape[1:])


def _check_dtype(cache: torch.Tensor) -> None:
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"blocks of {cache.dtype} cannot be compressed")
