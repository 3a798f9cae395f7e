"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.triton import norms, rope_kv
from tests.kernels.triton.gpu_builds import build


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp16"), (90, "bf16")])
def test_norm_and_gate(architecture: int, dtype: str) -> None:
    arguments = {"residual": "*fp32", "added": f"*{dtype}", "weight": "*fp32", "out": f"*{dtype}"}
    build(
        norms._add_rms_norm,
        architecture,
        arguments | {"width": "i32", "eps": "fp32"},
        {"ADDS": True, "BLOCK": 4096},
        num_warps=8,
    )
    gate = {"gate_up": f"*{dtype}", "out": f"*{dtype}", "width": "i32"}
    build(norms._silu_mul, architecture, gate, {"BLOCK": 1024})


@pytest.mark.parametrize(
    ("architecture", "dtype", "format", "whole"),
    [(80, "bf16", 2, True), (90, "bf16", 0, False), (90, "fp16", 1, False)],
)
def test_rotation_and_write(architecture: int, dtype: str, format: int, whole: bool) -> None:
    values = {0: f"*{dtype}", 1: "*i8", 2: "*u8"}[format]
    arguments = {"qkv": f"*{dtype}", "q": f"*{dtype}", "values": values}
    arguments |= {"scales": values if format == 0 else "*fp32", "slots": "*i64", "positions": "*i64"}
    arguments |= dict.fromkeys(("cos", "sin"), "*fp32") | dict.fromkeys(("q_weight", "k_weight"), f"*{dtype}")
    arguments |= {"eps": "fp32"}
    sizes = (
        "stride_qkv",
        "stride_angle",
        "num_heads",
        "kv_heads",
        "stride_block",
        "stride_plane",
        "stride_head",
    )
    arguments |= dict.fromkeys(sizes, "i32") | {"layer_begin": "i64"}
    constants: dict[str, Any] = {"HEAD_DIM": 128, "DIM": 128, "HALF": 64, "BLOCK_SIZE": 16, "FORMAT": format}
    constants |= {"HEADS": 32, "KV_HEADS": 8, "NORMED": True, "WHOLE": whole}
    ptx = build(rope_kv._rotate_and_write, architecture, arguments, constants, enable_fp_fusion=format == 0)
    assert format == 0 or "fma.rn.f32" not in ptx  # it would round otherwise than the CPU does
