"""Fields of the structs that Python fills in lie where the compiler has them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest

from kernels.cpu import structures
from kernels.cpu.build import SOURCES, BuildError, find_compiler
from kernels.cpu.gemm import _Activations
from kernels.cpu.sampling import PARAMS, RESULT

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "Matrix": structures.Matrix,
    "Layer": structures.Layer,
    "ModelShape": structures.ModelShape,
    "Model": structures.Model,
    "KvCache": structures.KvCache,
    "Step": structures.Step,
    "Activations": _Activations,
    "CacheView": structures.CacheView,
    "Routing": structures.Routing,
    "Gate": structures.Gate,
    "Expert": structures.Expert,
    "Moe": structures.Moe,
    "Exchange": structures.Exchange,
    "ExchangeHook": structures.ExchangeHook,
    "StepResult": structures.StepResult,
}
RECORDS: dict[str, np.dtype[np.void]] = {"SamplingParams": PARAMS, "SamplingResult": RESULT}
ENUMS = (
    structures.Format,
    structures.KvType,
    structures.EmbeddingKind,
    structures.RowType,
    structures.WireType,
)
WORDS = (  # their names are words in C++, not abbreviations
    structures.Scoring,
    structures.GroupScore,
    structures.GateKind,
    structures.Phase,
    structures.StepStatus,
)


def _layouts() -> Iterator[tuple[str, int, dict[str, tuple[int, int]]]]:
    """Name, size, and each field's offset and size."""
    for name, kind in STRUCTS.items():
        fields = {str(field[0]): getattr(kind, str(field[0])) for field in kind._fields_}
        yield name, ctypes.sizeof(kind), {field: (at.offset, at.size) for field, at in fields.items()}
    for name, record in RECORDS.items():
        assert record.fields is not None
        yield (
            name,
            record.itemsize,
            {field: (entry[1], entry[0].itemsize) for field, entry in record.fields.items()},
        )


def _claims() -> Iterator[str]:
    for name, size, fields in _layouts():
        yield f"sizeof(hr::{name}) == {size}"
        for field, (offset, length) in fields.items():
            yield f"offsetof(hr::{name}, {field}) == {offset}"
            yield f"sizeof(hr::{name}::{field}) == {length}"
    for kind in ENUMS:
        for value in kind:
            name = "Head" if value.name == "HEAD" else value.name
            yield f"static_cast<int>(hr::{kind.__name__}::{name}) == {int(value)}"
    for kind in WORDS:
        for value in kind:
            name = value.name.title().replace("_", "")
            yield f"static_cast<int>(hr::{kind.__name__}::{name}) == {int(value)}"


def test_layouts_are_the_compilers() -> None:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    includes = ("cstddef", "model.h", "sampling.h", "relayout.h")
    program = "".join(f"#include <{file}>\n" for file in includes)
    program += "".join(f'static_assert({claim}, "");\n' for claim in _claims())
    command = [*compiler, "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", "-xc++", "-"]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
