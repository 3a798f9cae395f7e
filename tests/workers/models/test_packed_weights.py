"""Packed matrices against the words of matrix.h, value by value; the file against damage and neighbours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.cpu.build import BuildError
from kernels.cpu.library import Library, load
from kernels.cpu.packed import PackedMatrix
from kernels.cpu.structures import Format
from workers.models import packed_weights
from workers.models.errors import ModelError
from workers.models.matrix_form import Matrix, to_float
from workers.models.packed_file import DamagedFile, PackedFile, PackedFileWriter, open_packed
from workers.models.packed_weights import PackKey, ToPack, load_packed, pack_matrix
from workers.models.quantize import quantize_channels, quantize_q4, quantize_q8

KEY = PackKey("ab" * 32, Format.BF16)


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return load()
    except BuildError as error:
        pytest.skip(str(error))


def value_at(packed: PackedMatrix, j: int, i: int) -> float:
    """The weight of feature j and input i, found as matrix.h describes the format."""
    k_pad, panel, n = packed.k_pad, j // 64, j % 64
    size = len(packed.data) // (packed.n_pad // 64)
    data = packed.data[panel * size : (panel + 1) * size]
    if packed.format == Format.F32:
        return float(data.view(np.float32).reshape(k_pad, 64)[i, n])
    if packed.format == Format.BF16:
        bits = int(data.view(np.uint16).reshape(k_pad // 2, 64, 2)[i // 2, n, i % 2])
        return float(np.uint32(bits << 16).view(np.float32))
    if packed.format == Format.I8:
        assert packed.scale is not None
        return float(packed.scale[j]) * (int(data.reshape(k_pad // 4, 64, 4)[i // 4, n, i % 4]) - 128)
    group, inside = data.reshape(k_pad // 32, -1)[i // 32], i % 32
    d = float(group[:128].view(np.float16)[n])
    if packed.format == Format.Q8:
        return d * (int(group[128:].reshape(8, 64, 4)[inside // 4, n, inside % 4]) - 128)
    byte = int(group[256:].reshape(4, 64, 4)[inside % 16 // 4, n, inside % 4])
    return d * (byte & 15 if inside < 16 else byte >> 4) + float(group[128:256].view(np.float16)[n])


def matrices() -> dict[str, Matrix]:
    weight = torch.randn(150, 96)
    return {
        "float": weight,
        "bfloat16": weight.bfloat16(),
        "int8": quantize_channels(weight),
        "q8": quantize_q8(weight),
        "q4": quantize_q4(weight),
    }


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("kind", matrices())
def test_values_are_where_the_layout_says(library: Library, kind: str, reordered: bool) -> None:
    matrix = matrices()[kind]
    rows = np.array([3, -1, *range(149, 80, -1), -1, 0, 0], np.int32) if reordered else None
    bias = torch.randn(150)
    format = Format.F32 if kind == "float" else Format.BF16
    packed = pack_matrix(matrix, rows, bias, format, library, threads=2)
    exact, given = to_float(matrix).float().numpy(), bias.numpy()
    order = np.arange(150) if rows is None else rows
    assert (packed.n, packed.k, packed.n_pad) == (len(order), 96, 128 if reordered else 192)
    assert packed.bias is not None
    for j, row in enumerate(order):
        expected = np.zeros(96) if row < 0 else exact[row]
        for i in range(0, 96, 1 if j % 16 == 0 else 13):
            assert np.float32(value_at(packed, j, i)) == expected[i], (j, i)
        assert packed.bias[j] == (0 if row < 0 else given[row])
    assert not packed.bias[len(order) :].any()


def entries() -> Iterator[ToPack]:
    torch.manual_seed(1)
    for name, matrix in matrices().items():
        yield ToPack(name, matrix, bias=torch.randn(150) if name == "q4" else None)
    yield ToPack("norm", torch.randn(96).bfloat16(), plain=True)
    yield ToPack("embedding", torch.randn(40, 96), plain=True)


def same(one: PackedFile, other: PackedFile) -> bool:
    assert one.matrices.keys() == other.matrices.keys()
    assert one.arrays.keys() == other.arrays.keys()
    pairs = [(one.arrays[name], other.arrays[name]) for name in one.arrays]
    for name, matrix in one.matrices.items():
        theirs = other.matrices[name]
        assert (matrix.format, matrix.n, matrix.k) == (theirs.format, theirs.n, theirs.k)
        pairs += [(matrix.data, theirs.data)]
        for mine, yours in ((matrix.scale, theirs.scale), (matrix.bias, theirs.bias)):
            assert (mine is None) == (yours is None)
            if mine is not None and yours is not None:
                pairs.append((mine, yours))
    return all(np.array_equal(mine, yours) for mine, yours in pairs)


def never() -> Iterator[ToPack]:
    raise AssertionError("it was packed again")


def test_packed_once_then_mapped(library: Library, tmp_path: Path) -> None:
    first = load_packed(tmp_path, KEY, entries, library)
    for memory in ("mmap", "huge"):
        again = load_packed(tmp_path, KEY, never, library, memory=memory)  # type: ignore[arg-type]
        assert same(first, again)
        for matrix in again.matrices.values():
            assert matrix.data.ctypes.data % 4096 == 0
            assert not matrix.data.flags.writeable
    assert first.matrices["q4"].bias is not None
    assert first.matrices["q8"].bias is None
    assert first.arrays["norm"].dtype == np.float32
    embedding = (first.arrays["embedding"].astype(np.uint32) << 16).view(np.float32)
    held = {entry.name: entry.value for entry in entries()}
    assert np.array_equal(embedding, held["embedding"].bfloat16().float().numpy())  # type: ignore[union-attr]
    directory = tmp_path / "packed" / KEY.name
    order = [first.matrices[name].data.ctypes.data for name in matrices()]
    assert order == sorted(order)  # as they were given
    open_packed(directory / "weights.bin", verify=True)


DAMAGES = ["cut", "longer", "empty", "foreign", "index", "no_head", "other_key", "gone"]


def damage(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    if kind == "cut":
        del data[-1:]
    elif kind == "longer":
        data += b"\0"
    elif kind == "empty":
        data.clear()
    elif kind == "foreign":
        data[:8] = b"GGUF\3\0\0\0"
    elif kind == "index":
        data[-20] ^= 1
    elif kind == "no_head":
        data[:64] = bytes(64)
    file.unlink()  # a mapping of the old file must not change
    if kind == "other_key":
        writer = PackedFileWriter(file, "another model's")
        writer.close(complete=True)
    elif kind != "gone":
        file.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_made_anew(library: Library, tmp_path: Path, kind: str) -> None:
    first = load_packed(tmp_path, KEY, entries, library)
    file = tmp_path / "packed" / KEY.name / "weights.bin"
    damage(file, kind)
    with pytest.raises((DamagedFile, FileNotFoundError)):
        open_packed(file, key=KEY.name)
    said: list[str] = []
    assert same(first, load_packed(tmp_path, KEY, entries, library, say=said.append))
    assert "made anew" in said[0]


def test_a_damaged_file_that_cannot_be_removed_is_said(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that belongs to somebody else, say."""
    load_packed(tmp_path, KEY, entries, library)
    damage(tmp_path / "packed" / KEY.name / "weights.bin", "cut")
    monkeypatch.setattr(packed_weights.shutil, "rmtree", lambda path, ignore_errors: None)
    with pytest.raises(ModelError, match=r"cannot be read: .*Remove .*HEADRACE_CACHE"):
        load_packed(tmp_path, KEY, entries, library)


def test_flipped_weights_are_found_when_asked(library: Library, tmp_path: Path) -> None:
    first = load_packed(tmp_path, KEY, entries, library)
    file = tmp_path / "packed" / KEY.name / "weights.bin"
    data = bytearray(file.read_bytes())
    data[4096 + first.matrices["float"].data.nbytes // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match="damaged weights"):
        open_packed(file, verify=True)


def test_failure_leaves_nothing(library: Library, tmp_path: Path) -> None:
    def broken() -> Iterator[ToPack]:
        yield next(entries())
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        load_packed(tmp_path, KEY, broken, library)
    assert not [path for path in (tmp_path / "packed").iterdir() if path.suffix != ".lock"]


def test_older_layouts_are_removed(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_packed(tmp_path, KEY, entries, library)
    other = PackKey("cd" * 32, Format.BF16)
    load_packed(tmp_path, other, entries, library)
    monkeypatch.setattr(packed_weights, "LAYOUT_VERSION", 99)
    load_packed(tmp_path, KEY, entries, library)
    left = sorted(path.name for path in (tmp_path / "packed").iterdir() if path.is_dir())
    assert len(left) == 2
    assert left[0].startswith("abab")
    assert left[0].endswith("-v99")
    assert left[1].startswith("cdcd")


def test_a_removed_file_stays_mapped(library: Library, tmp_path: Path) -> None:
    packed = load_packed(tmp_path, KEY, entries, library)
    before = packed.matrices["q8"].data.copy()
    os.remove(tmp_path / "packed" / KEY.name / "weights.bin")
    assert np.array_equal(packed.matrices["q8"].data, before)
