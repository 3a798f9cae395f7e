"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl

from kernels.triton import attention
from kernels.triton.attention import Tiling
from tests.kernels.triton.gpu_builds import build

FLOATS = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
INTS = ("num_seqs", "num_tiles", "stride_out", "window", "least", "num_parts")
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
    heads = {"HEADS": 4, "TILES": 1, "VALUES": dim, "HEAD_DIM": dim, "TAIL": 0, "ONE_PLANE": False}
    size = Tiling.choose(4, 8, 16, queries, 4096, dim, 4 if dtype == "fp32" else 2)
    check(architecture, dtype, format, size, heads, queries == 1, features)


@pytest.mark.parametrize(
    ("architecture", "num_heads", "format", "queries"),
    [
        (90, 128, 0, 1),
        pytest.param(90, 128, 0, 1000, marks=pytest.mark.slow),
        pytest.param(90, 16, 3, 1, marks=pytest.mark.slow),
        pytest.param(80, 128, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_attention_to_latents(architecture: int, num_heads: int, format: int, queries: int) -> None:
    """As wide as those of DeepSeek-V2 and V3: rows of 576, whose first 512 are values."""
    size = Tiling.choose(num_heads, 1, 16, queries, 4096, 512, 2)
    heads = {"HEADS": size.heads, "TILES": num_heads // size.heads, "VALUES": 512, "HEAD_DIM": 576}
    check(architecture, "bf16", format, size, heads | {"TAIL": 64, "ONE_PLANE": True}, queries == 1, ())


def check(
    architecture: int,
    dtype: str,
    format: int,
    size: Tiling,
    heads: dict[str, Any],
    one_each: bool,
    features: tuple[str, ...],
) -> None:
    """With parts of a context that the last of its programs adds up."""
    values = {0: f"*{dtype}", 1: "*i8", 2: "*u8", 3: "*u8"}[format]
    shared: dict[str, Any] = {"DIM": heads["VALUES"], "ROWS": size.rows, "KEYS": size.keys}
    shared |= {name: heads[name] for name in ("HEADS", "VALUES")}
    shared |= {"WINDOWED": "WINDOWED" in features, "SINKS": "SINKS" in features}
    where = {"out": f"*{dtype}", "parts": "*fp32", "sums": "*fp32", "arrived": "*i32", "sinks": f"*{dtype}"}
    where |= {"query_start": "*i32", "lengths": "*i32"} | dict.fromkeys(INTS, "i32")
    whole = {
        "q": f"*{dtype}",
        "values": values,
        "scales": values if format == 0 else "*fp32",
        "tables": "*i32",
    }
    whole |= where | dict.fromkeys(("stride_q", "table_width", "stride_block", "stride_head"), "i32")
    whole |= {"k_begin": "i64", "stride_plane": "i32", "scale": "fp32", "softcap": "fp32"}
    constants = shared | heads | {"BLOCK_SIZE": 16, "FORMAT": format, "OPERAND": FLOATS[dtype]}
    constants |= {"CAPPED": "CAPPED" in features, "SPLIT": True, "ONE_EACH": one_each}
    options = {"num_warps": size.warps, "num_stages": size.stages}
    ptx = build(attention._attend, architecture, whole, constants, **options)
    if dtype != "fp32":  # by the matrix units
        assert "mma" in ptx
        assert "ld.shared.b8" not in ptx  # values of a quantized cache are not fetched byte by byte
