"""KV blocks into the buffer for the wire and back: share of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu.timing import Case, Launch
from kernels.reference_relayout import Wire
from kernels.triton.relayout import gather, scatter


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    blocks, layers, heads, size, dim = (4, 2, 2, 4, 16) if tiny else (512, 32, 8, 16, 128)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cache = torch.randn(blocks, layers, 2, heads, size, dim, device=device, dtype=dtype)
    ids = torch.randperm(blocks, device=device)[: blocks // 2]
    wires: tuple[Wire | None, ...] = (None, "int8", "fp8")
    for wire in wires:
        staged = gather(cache, ids, wire=wire)
        needed = staged.nbytes + cache[: len(ids)].nbytes
        shape = {"blocks": len(ids), "layers": layers, "wire": wire or str(dtype)[6:]}
        forms: dict[str, Launch] = {"headrace": _gather(cache, ids, wire, staged)}
        if wire is None:
            forms["torch index_select"] = _select(cache, ids, staged)
        yield Case("blocks to the wire", shape, forms, needed)
        yield Case("blocks from the wire", shape, {"headrace": _scatter(cache, ids, wire, staged)}, needed)


def _gather(cache: torch.Tensor, ids: torch.Tensor, wire: Wire | None, out: torch.Tensor) -> Launch:
    return lambda: gather(cache, ids, wire=wire, out=out)


def _select(cache: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> Launch:
    return lambda: torch.index_select(cache, 0, ids, out=out)


def _scatter(cache: torch.Tensor, ids: torch.Tensor, wire: Wire | None, staged: torch.Tensor) -> Launch:
    return lambda: scatter(cache, ids, staged, wire=wire)
