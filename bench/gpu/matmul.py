"""Products with the weights of a layer, in every way that the engine chooses among: bf16, fp8, int8, int4.

Held against the copy bandwidth up to 64 rows, where reading the weight is what takes the time, and against the bf16
matmul rate beyond.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.timing import Case, Launch
from kernels.quantized_matrix import Format, QuantizedMatrix, Weight, pack_int4
from workers.models.matmul_forms import MatmulForm, forms_of

_MEMORY_BOUND_ROWS = 64
_WHOLE = 0  # one scale for each output
FORMATS: tuple[tuple[Format | None, int], ...] = (
    (None, _WHOLE),
    ("fp8", _WHOLE),
    ("int8", _WHOLE),
    ("int4", 128),
    ("int4", 32),
)


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    multiprocessors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    n, k = (64, 128) if tiny else (28672, 4096)  # gate and up of an 8B model
    for format, group in FORMATS:
        weight = random_weight(format, n, k, group or k, dtype, device)
        name = str(dtype)[6:] if format is None else f"{format} by {group or 'output'}"
        for rows in (2,) if tiny else (1, 16, 64, 256, 2048):
            x = torch.randn(rows, k, device=device).to(dtype)
            forms = {form.name: _product(form, x) for form in forms_of(weight, rows, multiprocessors)}
            yield Case(
                "product",
                {"rows": rows, "outputs": n, "inputs": k, "weight": name},
                dict(list(forms.items())[:2]) if tiny else forms,
                needed_bytes=weight.nbytes + x.nbytes + rows * n * dtype.itemsize,
                flops=2 * rows * n * k,
                ceiling="copy" if rows <= _MEMORY_BOUND_ROWS else "matmul",
            )


def _product(form: MatmulForm, x: Tensor) -> Launch:
    return lambda: form.product(x, None, x.dtype)


def random_weight(
    format: Format | None, n: int, k: int, group: int, dtype: torch.dtype, device: torch.device
) -> Weight:
    """[n, k] of floats, or random bits, scales and minima."""
    if format is None:
        return torch.randn(n, k, device=device).to(dtype)
    shape, minimum = (-(-k // group), n), None
    scale = torch.rand(shape, device=device) * 0.01 + 0.01
    if format == "int8":
        q = torch.randint(-128, 128, (n, k), device=device, dtype=torch.int8)
    elif format == "fp8":
        q = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    else:
        q = pack_int4(torch.randint(0, 16, (n, k), device=device, dtype=torch.uint8))
        scale, minimum = scale.half(), torch.zeros(shape, device=device, dtype=torch.float16)
    return QuantizedMatrix(format, q, scale, minimum, k, group, dtype=dtype)
