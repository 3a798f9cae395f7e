"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest

from kernels.triton import norms, rope_kv, rope_latent, write_kv
from tests.kernels.triton.gpu_builds import build


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp16"), (90, "bf16")])
def test_norm_and_gate(architecture: int, dtype: str) -> None:
    arguments = {"residual": "*fp32", "added": f"*{dtype}", "weight": "*fp32", "out": f"*{dtype}"}
    build(
        norms._add_rms_norm,
        architecture,
        arguments | {"stride": "i32", "width": "i32", "eps": "fp32"},
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


@pytest.mark.parametrize(("architecture", "format"), [(90, 0), (80, 2)])
def test_latents_and_the_queries_to_them(architecture: int, format: int) -> None:
    """As wide as DeepSeek-V3's."""
    values = "*u8" if format else "*bf16"
    arguments = {"rows": "*bf16", "queries": "*bf16", "q": "*bf16", "values": values}
    arguments |= {"scales": "*fp32" if format else values, "slots": "*i64", "positions": "*i64"}
    arguments |= {"cos": "*bf16", "sin": "*bf16", "weight": "*bf16", "eps": "fp32"}
    sizes = ("stride_rows", "stride_queries", "query_dim", "stride_angle", "num_heads", "stride_block")
    arguments |= dict.fromkeys(sizes, "i32") | {"layer_begin": "i64"}
    constants = {"RANK": 512, "HALF": 32, "HEAD_DIM": 576, "DIM": 1024, "ROTATED": 64, "HEADS": 128}
    constants |= {"BLOCK_SIZE": 16, "FORMAT": format}
    build(rope_latent._rotate_and_write_latents, architecture, arguments, constants)


def test_keys_and_values_as_they_are() -> None:
    arguments = {"k": "*bf16", "v": "*bf16", "values": "*bf16", "scales": "*bf16", "slots": "*i64"}
    sizes = ("stride_k", "stride_k_head", "stride_v", "stride_v_head", "num_heads", "stride_block")
    arguments |= dict.fromkeys((*sizes, "stride_plane", "stride_head"), "i32") | {"layer_begin": "i64"}
    constants = {"HEAD_DIM": 96, "DIM": 128, "HEADS": 8, "BLOCK_SIZE": 16, "FORMAT": 0}
    build(write_kv._write_kv, 90, arguments, constants)
