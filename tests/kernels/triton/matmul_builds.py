"""What test_triton.py runs besides: the kernels compile for real GPUs, which needs none."""

from __future__ import annotations

import pytest
import triton.language as tl

from kernels.quantized_matrix import PAIR
from kernels.triton import dequantize, matmul, quantize_rows
from tests.kernels.triton.gpu_builds import build

OPERANDS = {"bf16": tl.bfloat16, "fp16": tl.float16}
# name -> FORMAT, pointer type of q, DEPTH where a row or a wide group shares a scale
FORMATS = {
    "floats": (0, "*{dtype}", 64),
    "int8": (1, "*i8", 128),
    "int4": (2, "*i8", PAIR),
    "fp8 by hand": (3, "*u8", 128),
    "fp8": (4, "*fp8e4nv", 128),
}


def build_multiply(
    architecture: int, dtype: str, name: str, group: int, split: bool, columns: int, rows: int
) -> str:
    format, q, depth = FORMATS[name]
    arguments = {"x": f"*{dtype}", "q": q.format(dtype=dtype)}
    arguments |= dict.fromkeys(("scale", "minimum"), "*fp16" if name == "int4" else "*fp32")
    arguments |= {
        "order": "*i32",
        "bias": f"*{dtype}",
        "out": f"*{dtype}",
        "partial": "*fp32",
        "arrivals": "*i32",
    }
    arguments |= dict.fromkeys(("rows", "n", "k", "width", "stride_x", "steps"), "i32")
    constants = {"FORMAT": format, "GROUP": group, "ORDERED": False, "BIASED": True, "SPLIT": split}
    span = 64 if name == "int4" else 128
    constants["UNROLL"] = 1 if rows > 32 or format == 0 else span // min(depth, group or depth)
    constants |= {"COLUMNS": columns, "ROWS": rows, "DEPTH": min(depth, group or depth), "HALF": PAIR}
    constants |= {"EVEN": True, "OPERAND": OPERANDS[dtype]}
    aligned = [name for name in arguments if name not in ("rows", "steps")]
    return build(matmul._multiply, architecture, arguments, constants, aligned, num_warps=4, num_stages=4)


@pytest.mark.parametrize(
    ("architecture", "dtype", "name", "group"),
    [
        (80, "fp16", "int4", 128),
        (90, "bf16", "fp8", 0),
        pytest.param(80, "bf16", "fp8 by hand", 0, marks=pytest.mark.slow),
        pytest.param(90, "bf16", "floats", 0, marks=pytest.mark.slow),
        pytest.param(90, "bf16", "int8", 32, marks=pytest.mark.slow),
        pytest.param(90, "bf16", "int4", 32, marks=pytest.mark.slow),
    ],
)
def test_few_rows(architecture: int, dtype: str, name: str, group: int) -> None:
    ptx = build_multiply(architecture, dtype, name, group, split=True, columns=64, rows=16)
    assert "mma" in ptx  # the matrix units
    assert "cp.async" in ptx  # the weight is read ahead
    assert "atom.global.gpu.acq_rel" in ptx.replace(".global.acq_rel.gpu", ".global.gpu.acq_rel")
    assert "ld.global.cg" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(("name", "group"), [("int8", 0), ("int4", 64), ("floats", 0)])
def test_more_rows(architecture: int, rows: int, name: str, group: int) -> None:
    assert "mma" in build_multiply(architecture, "bf16", name, group, split=False, columns=128, rows=rows)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_what_surrounds_many_rows(architecture: int) -> None:
    arguments = {
        "x": "*bf16",
        "q": "*u8",
        "scale": "*fp32",
        "width": "i32",
        "stride": "i32",
        "largest": "fp32",
    }
    for int8 in (True, False):
        constants = {"INT8": int8, "BLOCK": 2048}
        ptx = build(
            quantize_rows._quantize_rows, architecture, arguments, constants, ("x", "q", "width", "stride")
        )
        assert "div.rn.f32" in ptx  # bit for bit as on a CPU
        assert "ld.global.v" in ptx  # several values at a time
    arguments = {
        "sums": "*i32",
        "row_scale": "*fp32",
        "column_scale": "*fp32",
        "bias": "*bf16",
        "out": "*bf16",
    }
    build(quantize_rows._rescale, architecture, arguments | {"width": "i32"}, {"BIASED": True, "BLOCK": 2048})
    for format, group in ((1, 0), (2, 64), (3, 128)):
        arguments = {"q": "*u8", "scale": "*fp16", "minimum": "*fp16", "out": "*bf16"}
        arguments |= dict.fromkeys(("begin", "end", "n", "k", "width"), "i32")
        constants = {"FORMAT": format, "GROUP": group, "HALF": PAIR, "ROWS": 16, "COLUMNS": 256}
        build(dequantize._dequantize, architecture, arguments, constants, tuple(arguments))
