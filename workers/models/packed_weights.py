"""A model's weights in the layout of the native kernels: packed once on a host, then mapped by every worker of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.gemm import allocate, pack, pack_grouped
from kernels.cpu.layout import PANEL
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedMatrix
from kernels.cpu.structures import Format
from workers.models.cache import made_once
from workers.models.errors import ModelError
from workers.models.matrix_form import Matrix
from workers.models.packed_file import DamagedFile, Memory, PackedFile, PackedFileWriter, open_packed
from workers.models.quantized import Q8_OFFSET, ChannelWeight, GroupedWeight

logger = logging.getLogger(__name__)

# Raise it when kernels/cpu/src/matrix.h or the order of columns or entries changes: older files are then made anew.
LAYOUT_VERSION = 1

# Files of a model. Experts have their own: a rank that has few of them does not read the others.
WEIGHTS, EXPERTS = "weights", "experts"

Say = Callable[[str], None]
A = TypeVar("A", bound=np.generic)


@dataclass(frozen=True, eq=False)
class ToPack:
    """One matrix, [n, k], or one plain array."""

    name: str
    value: Matrix
    rows: NDArray[np.int32] | None = (
        None  # which row of `value` becomes each column; -1: zeros. None: in order
    )
    bias: Tensor | None = None  # [n], in the order of the rows of `value`
    plain: bool = False  # kept as rows: norms (float32), the embedding of an untied model (float_format)
    exact: bool = False  # a matrix of floats that is float32 whatever float_format is: a router
    file: str = WEIGHTS


@dataclass(frozen=True)
class PackKey:
    """What a packed file depends on, besides the layout."""

    weights: str  # weights_fingerprint
    float_format: Format  # of what the scheme leaves in floats: Format.BF16 or Format.F32

    @property
    def stem(self) -> str:
        return f"{self.weights[:24]}-{self.float_format.name.lower()}"

    @property
    def name(self) -> str:
        return f"{self.stem}-v{LAYOUT_VERSION}"


def load_packed(
    cache: Path,
    key: PackKey,
    entries: Callable[[], Iterable[ToPack]],
    library: Library,
    *,
    threads: int = 1,
    memory: Memory = "mmap",
    files: Sequence[str] = (WEIGHTS,),
    lazy: Sequence[str] = (),
    say: Say = logger.info,
) -> PackedFile:
    """The files of `key` in `cache`/packed as one, made from `entries()` where they are not there, or not whole.

    `entries` come in the order in which a step reads them; they are asked for only when the files have to be made.
    `files` are those that the entries go to. Of the `lazy` ones no page is read before somebody asks for it. Raises
    ModelError.
    """
    target = cache / "packed" / key.name

    def make(directory: Path) -> None:
        say("packing the weights for the native kernels, once ...")
        with ExitStack() as files:
            writers: dict[str, PackedFileWriter] = {}
            for entry in entries():
                if entry.file not in writers:
                    writer = PackedFileWriter(directory / f"{entry.file}.bin", key.name)
                    writers[entry.file] = files.enter_context(writer)
                _write(writers[entry.file], entry, key.float_format, library, threads)

    if target.is_dir():
        try:
            return _opened(target, memory, key, files, lazy)
        except (DamagedFile, OSError) as error:
            # Others may have it mapped: what is removed stays theirs until they end.
            say(f"packed weights are made anew: {error}")
            shutil.rmtree(target, ignore_errors=True)
    made_once(target, make, say)
    _remove_older(target, key)
    try:
        return _opened(target, memory, key, files, lazy)
    except (DamagedFile, OSError) as error:
        raise ModelError(
            f"packed weights cannot be read: {error}. Remove {target}, or set HEADRACE_CACHE to another directory"
        ) from error


def _opened(
    target: Path, memory: Memory, key: PackKey, files: Sequence[str], lazy: Sequence[str]
) -> PackedFile:
    whole = PackedFile(key.name, {}, {})
    for file in files:
        opened = open_packed(target / f"{file}.bin", "lazy" if file in lazy else memory, key=key.name)
        whole.matrices.update(opened.matrices)
        whole.arrays.update(opened.arrays)
    return whole


def _remove_older(target: Path, key: PackKey) -> None:
    for other in target.parent.glob(f"{key.stem}-v*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def _write(
    writer: PackedFileWriter, entry: ToPack, float_format: Format, library: Library, threads: int
) -> None:
    value = entry.value
    if not entry.plain:
        form = Format.F32 if entry.exact else float_format
        writer.matrix(entry.name, pack_matrix(value, entry.rows, entry.bias, form, library, threads))
        return
    assert isinstance(value, Tensor), f"{entry.name} is to be kept as rows, but is quantized"
    kept_short = value.ndim == 2 and float_format == Format.BF16
    writer.array(entry.name, _bits(value) if kept_short else _float32(value))


def pack_matrix(
    value: Matrix,
    rows: NDArray[np.int32] | None,
    bias: Tensor | None,
    float_format: Format,
    library: Library,
    threads: int = 1,
) -> PackedMatrix:
    """`value` [n, k] in panels; see `ToPack` for `rows` and `bias`."""
    columns = None if bias is None else _gathered(_float32(bias), rows)
    if isinstance(value, GroupedWeight):
        format = Format.Q8 if value.format == "q8" else Format.Q4
        return pack_grouped(
            library, format, value.q, value.d, value.m, rows=rows, bias=columns, threads=threads
        )
    if isinstance(value, ChannelWeight):
        return _pack_channels(value, rows, columns)
    assert isinstance(value, Tensor), "the native kernels have no float8"
    floats: NDArray[np.generic] = _bits(value) if float_format == Format.BF16 else _float32(value)
    return pack(library, float_format, floats, rows=rows, bias=columns, threads=threads)


def _pack_channels(
    value: ChannelWeight, rows: NDArray[np.int32] | None, bias: NDArray[np.float32] | None
) -> PackedMatrix:
    """[k / 4][64][4] of each panel: the integers as they are, so that nothing is rounded that has been rounded."""
    q = _gathered(value.q, rows)
    n, k = q.shape
    packed = allocate(Format.I8, n, k, None, bias)
    assert packed.scale is not None  # I8 has one
    quads = packed.data.view(np.uint32).reshape(-1, packed.k_pad // 4, PANEL)
    for panel, into in enumerate(quads):
        part = np.full((PANEL, packed.k_pad), Q8_OFFSET, np.uint8)
        given = q[panel * PANEL : (panel + 1) * PANEL]
        part[: len(given), :k] = given.view(np.uint8) + np.uint8(Q8_OFFSET)
        into[:] = part.view(np.uint32).T
    packed.scale[:n], packed.scale[n:] = _gathered(value.scale, rows), 0
    return packed


def _gathered(values: NDArray[A], rows: NDArray[np.int32] | None) -> NDArray[A]:
    """Rows of `values`, zeros for -1."""
    if rows is None:
        return values
    gathered = values[rows]
    gathered[rows < 0] = 0
    return gathered


def _float32(value: Tensor) -> NDArray[np.float32]:
    floats: NDArray[np.float32] = value.detach().to(torch.float32).contiguous().numpy()
    return floats


def _bits(value: Tensor) -> NDArray[np.uint16]:
    """As bfloat16, which numpy does not have."""
    short = value.detach().to(torch.bfloat16).contiguous()
    bits: NDArray[np.uint16] = short.view(torch.int16).numpy().view(np.uint16)
    return bits
