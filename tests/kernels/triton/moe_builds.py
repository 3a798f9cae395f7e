"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.quantized_matrix import PAIR
from kernels.triton import moe, moe_align, moe_route
from tests.kernels.triton.matmul_builds import FORMATS

TYPES = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}


def build(kernel: Any, architecture: int, arguments: dict[str, str], constants: dict[str, Any]) -> str:
    signature = arguments | dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", architecture, 32)
    return str(triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target).asm["ptx"])


@pytest.mark.parametrize(
    ("architecture", "dtype", "biased", "stored"),
    [
        (80, "bf16", True, None),
        (90, "fp16", False, ("int4", 64)),
        pytest.param(80, "bf16", True, ("fp8 by hand", 0), marks=pytest.mark.slow),
        pytest.param(90, "bf16", False, ("fp8", 128), marks=pytest.mark.slow),
        pytest.param(90, "fp32", True, None, marks=pytest.mark.slow),
    ],
)
def test_experts(architecture: int, dtype: str, biased: bool, stored: tuple[str, int] | None) -> None:
    values, blocks = TYPES[dtype], {"rows": "*i32", "experts": "*i32"}
    matrix = {"w": values, "scale": values, "minimum": values}
    form = {"FORMAT": 0, "GROUP": 0, "DEPTH": 32 if dtype == "fp32" else 64}
    if stored is not None:
        format, pointer, depth = FORMATS[stored[0]]
        form = {"FORMAT": format, "GROUP": stored[1], "DEPTH": min(depth, stored[1] or depth)}
        matrix = {"w": pointer, "scale": "*fp32", "minimum": "*fp32"}
    tile = {"ROWS": 64, "COLUMNS": 64, "HALF": PAIR, **form}
    sizes = dict.fromkeys(("count", "num_experts", "top_k", "hidden", "inner", "width"), "i32")
    first = (
        dict.fromkeys(("x", "bias", "middle"), values)
        | matrix
        | blocks
        | sizes
        | {"alpha": "fp32", "limit": "fp32"}
    )
    ptx = [build(moe._gate_up, architecture, first, {"BIASED": biased, "CLAMPED": biased, **tile})]
    del sizes["top_k"]
    second = dict.fromkeys(("middle", "bias"), values) | {"weights": "*fp32", "results": "*fp32"} | matrix
    ptx.append(build(moe._down, architecture, second | blocks | sizes, {"BIASED": biased, **tile}))
    if dtype != "fp32":  # by the matrix units
        assert all("mma" in text for text in ptx)
    third = {"results": "*fp32", "experts": "*i64", "out": "*fp32", "num_experts": "i32", "hidden": "i32"}
    build(moe._sum, architecture, third, {"TOP_K": 8, "WIDTH": 1024})


@pytest.mark.parametrize(("architecture", "groups", "top2"), [(80, 1, False), (90, 8, False), (90, 8, True)])
def test_routing(architecture: int, groups: int, top2: bool) -> None:
    arguments = {"logits": "*fp32", "bias": "*fp32", "slots": "*i64"}
    arguments |= {"weights": "*fp32", "chosen": "*i64"}
    arguments |= {"num_tokens": "i32", "num_experts": "i32", "scale": "fp32"}
    constants = {"TOP_K": 6, "SIGMOID": top2, "SOFTMAX_AFTER": False, "NORMALIZE": True, "BIASED": top2}
    constants["SLOTS"] = True
    constants |= {
        "GROUPS": groups,
        "TOP_GROUPS": (groups + 1) // 2,
        "TOP2_SUM": top2,
        "EXPERTS": 256,
        "TOKENS": 4,
    }
    build(moe_route._route, architecture, arguments, constants)


@pytest.mark.parametrize(("architecture", "size", "experts"), [(80, 16, 64), (90, 128, 512)])
def test_blocks_of_rows(architecture: int, size: int, experts: int) -> None:
    arguments = {"experts": "*i64", "rows": "*i32", "of_blocks": "*i32", "cursors": "*i32", "given": "*i64"}
    arguments |= dict.fromkeys(("count", "num_experts", "number"), "i32")
    constants = {"COUNTED": True, "SIZE": size, "EXPERTS": experts, "CHUNK": 2048, "BLOCKS": 32}
    build(moe_align._align, architecture, arguments, constants)
