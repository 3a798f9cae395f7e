"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl

from kernels.triton import attention
from kernels.triton.attention import Tiling
from tests.kernels.triton.gpu_builds import build

FLOATS = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
INTS = ("num_seqs", "stride_out", "window", "split_keys", "num_splits")
FEATURES = ("WINDOWED", "SINKS", "CAPPED")


@pytest.mark.parametrize(
    ("architecture", "dtype", "format", "dim", "queries", "features"),
    [
        (90, "bf16", 3, 128, 1, FEATURES),
        pytest.param(90, "bf16", 0, 128, 1000, FEATURES, marks=pytest.mark.slow),
        pytest.param(80, "bf16", 0, 128, 1, (), marks=pytest.mark.slow),
        pytest.param(80, "fp16", 2, 128, 1000, ("WINDOWED",), marks=pytest.mark.slow),
        pytest.param(90, "bf16", 1, 64, 3, (), marks=pytest.mark.slow),
        pytest.param(90, "fp32", 0, 64, 1000, ("SINKS",), marks=pytest.mark.slow),
        pytest.param(90, "fp32", 1, 256, 1, (), marks=pytest.mark.slow),
        pytest.param(86, "bf16", 0, 256, 1000, (), marks=pytest.mark.slow),
        pytest.param(80, "bf16", 0, 256, 1, (), marks=pytest.mark.slow),
    ],
)
def test_attention(
    architecture: int, dtype: str, format: int, dim: int, queries: int, features: tuple[str, ...]
) -> None:
    group = 4
    size = Tiling.choose(group, queries, 4096, dim, 4 if dtype == "fp32" else 2)
    values = {0: f"*{dtype}", 1: "*i8", 2: "*u8", 3: "*u8"}[format]
    shared: dict[str, Any] = {"GROUP": group, "HEAD_DIM": dim, "DIM": dim, "ROWS": size.rows}
    shared |= {"WINDOWED": "WINDOWED" in features, "SINKS": "SINKS" in features}
    where = {"out": f"*{dtype}", "parts": "*fp32", "sums": "*fp32", "sinks": f"*{dtype}"}
    where |= {"query_start": "*i32", "lengths": "*i32"} | dict.fromkeys(INTS, "i32")
    whole = {
        "q": f"*{dtype}",
        "values": values,
        "scales": values if format == 0 else "*fp32",
        "tables": "*i32",
    }
    whole |= where | dict.fromkeys(("stride_q", "table_width", "stride_block", "stride_head"), "i32")
    whole |= {"k_begin": "i64", "v_begin": "i64", "scale": "fp32", "softcap": "fp32"}
    constants = shared | {"KEYS": size.keys, "BLOCK_SIZE": 16, "FORMAT": format, "OPERAND": FLOATS[dtype]}
    constants |= {"CAPPED": "CAPPED" in features, "SPLIT": True, "ONE_EACH": queries == 1}
    options = {"num_warps": size.warps, "num_stages": size.stages}
    ptx = build(attention._attend, architecture, whole, constants, **options)
    if dtype != "fp32":  # by the matrix units
        assert "mma" in ptx
    build(attention._add_parts, architecture, where, shared)
