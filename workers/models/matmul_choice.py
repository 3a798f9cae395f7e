"""The fastest form of each product on this GPU: measured once for each shape and number of rows, then read from a file.

$HEADRACE_CACHE/matmul/GPU-torch-triton-kernels.json: {shape: {rows: name of a form}}, for one state of the kernels'
source. What a form computes is held against eager torch before it may be chosen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kernels.quantized_matrix import QuantizedMatrix, Weight
from kernels.reference_matmul import multiply
from workers.models import matmul_forms
from workers.models.cache import default_cache_dir
from workers.models.matmul_forms import MatmulForm, eager, forms_of

logger = logging.getLogger(__name__)

# A form is chosen for up to so many rows; the last one for all that are more.
BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)

_WORTH_MEASURING = 1 << 20
_RUNS = 5
_CHECKED_ROWS, _CHECKED_COLUMNS = 5, 2048
# Of the largest result: operands and results of 16 bits round, activations of 8 bits (fp8: 2^-4) far more.
_TOLERANCE, _ROUNDED_TOLERANCE = 0.02, 0.06
_UNKNOWN_MULTIPROCESSORS = 108


class Timer(Protocol):
    def seconds(self, launch: Callable[[], object]) -> float: ...


class CudaTimer:
    """By events; the weight is not in the L2 cache, as in a model that is larger."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors: int = properties.multi_processor_count
        self._device = device
        self._l2_bytes: int = properties.L2_cache_size

    def seconds(self, launch: Callable[[], object]) -> float:
        """The median of a few."""
        other = torch.empty(2 * self._l2_bytes, dtype=torch.uint8, device=self._device)
        event = partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(_RUNS)]
        launch()  # compiles
        for begin, end in events:
            other.zero_()  # so long that the launch is queued before the GPU comes to it
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize(self._device)
        return float(statistics.median(begin.elapsed_time(end) for begin, end in events)) / 1e3


class Choices:
    """Of one kind of device. `timer` None: nothing is measured, the first of the forms is taken."""

    def __init__(
        self,
        timer: Timer | None,
        file: Path | None,
        multiprocessors: int = _UNKNOWN_MULTIPROCESSORS,
        worth_measuring: int = _WORTH_MEASURING,
    ) -> None:
        """worth_measuring: weights that a matrix must have; any form will do for a smaller one."""
        self._timer, self._file, self._multiprocessors = timer, file, multiprocessors
        self._worth_measuring = worth_measuring
        self._names = {} if file is None else _read(file)

    def of(self, weight: Weight, dtype: torch.dtype) -> list[MatmulForm]:
        """A form for each of BUCKETS; the result is to be of `dtype`."""
        if self._timer is None or weight.shape[0] * weight.shape[1] < self._worth_measuring:
            return [self._forms(weight, dtype, rows)[0] for rows in BUCKETS]
        shape, began = _shape(weight, dtype), time.monotonic()
        names = self._names.setdefault(shape, {})
        known = dict(names)
        chosen = [self._one(weight, dtype, rows, names, self._timer) for rows in BUCKETS]
        if names != known:
            logger.info("products of %s measured in %.1f s: %s", shape, time.monotonic() - began, names)
            self._write()
        return chosen

    def _forms(self, weight: Weight, dtype: torch.dtype, rows: int) -> list[MatmulForm]:
        forms = forms_of(weight, rows, self._multiprocessors)
        # A wider result is asked for where its last bits decide, as the head's do.
        return [form for form in forms if not form.rounds or dtype == weight.dtype]

    def _one(
        self, weight: Weight, dtype: torch.dtype, rows: int, names: dict[str, str], timer: Timer
    ) -> MatmulForm:
        forms = self._forms(weight, dtype, rows)
        for form in forms:
            if form.name == names.get(str(rows)):
                return form
        right = [form for form in forms if _is_right(form, weight, dtype, max(rows, _CHECKED_ROWS))]
        if not right:
            logger.warning("%s is multiplied by eager torch, much slower", _shape(weight, dtype))
            return eager(weight)
        x = _random_rows(weight, rows)
        fastest = min(right, key=lambda form: timer.seconds(lambda: form.product(x, None, dtype)))
        names[str(rows)] = fastest.name
        return fastest

    def _write(self) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # What other processes found meanwhile is kept.
            self._names = {**_read(self._file), **self._names}
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self._names, indent=1, sort_keys=True))
            temporary.replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written, the next start measures again: %s", self._file, error)


@functools.cache
def choices_on(device: torch.device) -> Choices:
    """Of this process. On a GPU it measures; elsewhere (Triton's interpreter) it takes what is usual."""
    if device.type != "cuda":
        return Choices(None, None)
    import triton

    timer = CudaTimer(device)
    gpu = torch.cuda.get_device_name(device)
    name = f"{gpu}-{torch.__version__}-{triton.__version__}-{_sources()}"
    file = default_cache_dir() / "matmul" / (re.sub(r"[^\w.+-]+", "_", name) + ".json")
    return Choices(timer, file, timer.multiprocessors)


def _sources() -> str:
    """Of what was measured: another kernel may be slower, or wrong."""
    from kernels.triton import dequantize, matmul, quantize_rows

    files = [module.__file__ for module in (dequantize, matmul, quantize_rows, matmul_forms)]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:12]


def _shape(weight: Weight, dtype: torch.dtype) -> str:
    n, k = weight.shape
    floats = str(weight.dtype).removeprefix("torch.")
    result = str(dtype).removeprefix("torch.")
    if isinstance(weight, Tensor):
        return f"{n}x{k} {floats} to {result}"
    ordered = "" if weight.order is None else " scattered"
    return f"{n}x{k} {weight.format} by {weight.group}{ordered}, {floats} to {result}"


def _random_rows(weight: Weight, rows: int) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(0)
    return torch.randn(rows, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)


def _is_right(form: MatmulForm, weight: Weight, dtype: torch.dtype, rows: int) -> bool:
    """Whether it computes at all, and what eager torch does."""
    x, some = _random_rows(weight, rows), slice(0, _CHECKED_COLUMNS)
    if isinstance(weight, QuantizedMatrix):
        part = weight.rows(0, min(_CHECKED_COLUMNS, weight.shape[0]))
        wanted = multiply(x[:_CHECKED_ROWS], part, None, torch.float32)
    else:
        wanted = x[:_CHECKED_ROWS].float() @ weight[some].float().T
    try:
        found = form.product(x, None, dtype)[:_CHECKED_ROWS, some].float()
    except Exception as error:  # noqa: BLE001  # of Triton, a compiler or a library: the others remain
        logger.warning("%s of %s is left out: %s", form.name, _shape(weight, dtype), error)
        return False
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    if not off <= (_ROUNDED_TOLERANCE if form.rounds else _TOLERANCE):  # NaN too
        logger.warning(
            "%s of %s is left out: wrong by %.3g of the largest", form.name, _shape(weight, dtype), off
        )
        return False
    return True


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not read, products are measured again: %s", file, error)
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        shape: {str(rows): str(name) for rows, name in names.items()}
        for shape, names in found.items()
        if isinstance(names, dict)
    }
