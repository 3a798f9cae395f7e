"""Compiles the kernels that an 8B model's products may take, in as many processes as there are cores.

python -m bench.gpu.warm [--json FILE]

An engine measures every form of a product at its first start and compiles each, one after another. What is compiled here
before waits in Triton's cache; nothing is measured or kept besides.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from bench.gpu.matmul import FORMATS, random_weight
from bench.gpu.model import LLAMA_8B
from bench.gpu.rows import Rows, parser
from kernels.quantized_matrix import Format
from workers.models.matmul_choice import Choices
from workers.models.spec import DecoderSpec


class Job(NamedTuple):
    outputs: int
    inputs: int
    format: Format | None
    group: int  # 0: one scale for each output
    result: torch.dtype


class Untimed:
    """In place of a timer: every form is launched."""

    def seconds(self, launch: Callable[[], object]) -> float:
        launch()
        return 0.0


def jobs() -> list[Job]:
    """Largest first."""
    spec = DecoderSpec.from_config(dict(LLAMA_8B))
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    shapes = [
        (spec.vocab_size, hidden, torch.float32),
        (2 * inner, hidden, torch.bfloat16),
        (hidden, inner, torch.bfloat16),
        (heads + 2 * spec.num_kv_heads * spec.head_dim, hidden, torch.bfloat16),
        (hidden, heads, torch.bfloat16),
    ]
    engines: tuple[Format | None, ...] = ("fp8", None)
    found = [Job(spec.vocab_size, hidden, "int8", 32, torch.float32)]  # the head beside fp8
    for format in engines:
        found += [Job(n, k, format, 0, dtype) for n, k, dtype in shapes[1 if format == "fp8" else 0 :]]
    compared = [
        one for one in FORMATS if one[0] not in engines
    ]  # by bench.gpu.matmul, with one of the matrices
    return found + [Job(2 * inner, hidden, *one, torch.bfloat16) for one in compared]


def compile_forms(job: Job) -> None:
    device = torch.device("cuda")
    weight = random_weight(
        job.format, job.outputs, job.inputs, job.group or job.inputs, torch.bfloat16, device
    )
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    Choices(Untimed(), None, multiprocessors).of(weight, job.result)


def main() -> None:
    options = parser("bench.gpu.warm", __doc__).parse_args()
    rows = Rows(options.json)
    if options.rehearse or not torch.cuda.is_available():
        rows.note(skipped="needs a GPU")
        rows.end()
        return
    todo, began = jobs(), time.monotonic()
    workers, context = min(len(todo), os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with rows.part("compiling"), ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(compile_forms, todo))
        rows.add(case="forms of products compiled", matrices=len(todo), seconds=time.monotonic() - began)
    rows.end()


if __name__ == "__main__":
    main()
