"""What test_triton.py runs besides: every form of the kernels compiles for real GPUs, which needs none."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton import relayout

STRIDES = tuple(f"stride_{name}" for name in ("block", "layer", "kv", "head", "token", "dim"))
COUNTS = ("layers", "heads", "tokens", "dim")
POINTERS = {-1: "*i8", 0: "*i32", 1: "*i16", 2: "*i16"}  # by KIND


# Triton takes an argument that is 1 for a constant: none is, and all that can be.
@pytest.mark.parametrize(("architecture", "ones"), [(80, ()), (90, ("stride_dim", *COUNTS))])
@pytest.mark.parametrize(
    ("kind", "wire"), [(-1, 0), *((kind, wire) for kind in range(3) for wire in range(3))]
)
def test_builds(architecture: int, ones: tuple[str, ...], kind: int, wire: int) -> None:
    for kernel, blocks in ((relayout._gather, "out"), (relayout._scatter, "blocks")):
        constants: dict[str, Any] = {
            "KIND": kind,
            "WIRE": wire,
            "TOKENS": 16,
            "DIM": 64,
            **dict.fromkeys(ones, 1),
        }
        signature = {
            "cache": POINTERS[kind],
            "ids": "*i64",
            blocks: POINTERS[kind] if wire == 0 else "*u8",
        }
        signature |= dict.fromkeys(STRIDES, "i64") | dict.fromkeys(COUNTS, "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        built = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=GPUTarget("cuda", architecture, 32),
            options={"enable_fp_fusion": False},
        )
        # Each would round otherwise than the CPU does.
        assert not [word for word in ("fma.rn.f32", ".ftz", ".approx") if word in built.asm["ptx"]]
