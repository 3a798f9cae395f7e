"""The quantized matrices of a GGUF file as llama.cpp stored them, kept beside the dequantized ones.

`gguf_blocks.bin` in an imported model directory holds, by Hugging Face name, the bytes of each matrix whose
type the kernels can hold, [n, bytes of a row], rows in Hugging Face's order. Its metadata give the GGUF type of every
matrix of the model, of those that are not kept too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.models.errors import ModelError
from workers.models.quantized import GROUP, Q8_OFFSET, GroupedWeight

FILE_NAME = "gguf_blocks.bin"
PLAIN_TYPES = ("F32", "F16", "BF16", "F64")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class KeptMatrix:
    name: str  # Hugging Face's, with ".weight"
    shape: tuple[int, int]  # of the bytes
    read: Callable[[], Bytes]  # called when it is written, so that one matrix is in memory at a time


def write_blocks(directory: Path, matrices: Sequence[KeptMatrix], types: Mapping[str, str]) -> None:
    """`types`: name -> GGUF type of every matrix. Written as a stream, since a model may exceed the memory."""
    header: dict[str, Any] = {"__metadata__": {"types": json.dumps(types)}}
    offset = 0
    for matrix in matrices:
        size = matrix.shape[0] * matrix.shape[1]
        header[matrix.name] = {
            "dtype": "U8",
            "shape": list(matrix.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (directory / FILE_NAME).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for matrix in matrices:
            data = np.ascontiguousarray(matrix.read())
            assert data.shape == matrix.shape, f"{matrix.name} is {data.shape}, not {matrix.shape}"
            stream.write(data.data)


class GgufBlocks:
    """The kept matrices of an imported directory. Raises ModelError when the file is damaged."""

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        file = directory / FILE_NAME
        try:
            opened: Any = safe_open(file, framework="np")
            self.types: dict[str, str] = json.loads((opened.metadata() or {})["types"])
            self._file, self._names = opened, set(opened.keys())
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ModelError(f"{file} is damaged ({error}); remove {directory} and start again") from error

    @staticmethod
    def are_in(directory: Path) -> bool:
        return (directory / FILE_NAME).is_file()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def was_quantized(self, name: str) -> bool:
        """Whether the GGUF held `name` in fewer bits than the float tensor that was made of it."""
        return self.types.get(name, "F32") not in PLAIN_TYPES

    def read(self, name: str) -> GroupedWeight:
        return READERS[self.types[name]](self._file.get_tensor(name))


def _q4_0(data: Bytes) -> GroupedWeight:
    """half d, 16 bytes; value = d (q - 8). The minimum -8 d is exact: a power of two times d."""
    blocks = data.reshape(data.shape[0], -1, 18)
    d = _halves(blocks[:, :, :2])
    return GroupedWeight("q4", _nibbles(blocks[:, :, 2:]), d, d * np.float16(-8))


def _q4_1(data: Bytes) -> GroupedWeight:
    """half d, half m, 16 bytes; value = d q + m."""
    blocks = data.reshape(data.shape[0], -1, 20)
    return GroupedWeight(
        "q4", _nibbles(blocks[:, :, 4:]), _halves(blocks[:, :, :2]), _halves(blocks[:, :, 2:4])
    )


def _q8_0(data: Bytes) -> GroupedWeight:
    """half d, 32 signed bytes; value = d q."""
    blocks = data.reshape(data.shape[0], -1, 34)
    q = blocks[:, :, 2:] + np.uint8(Q8_OFFSET)  # modulo 256: from two's complement to an offset
    return GroupedWeight("q8", q.reshape(data.shape[0], -1), _halves(blocks[:, :, :2]))


def _q4_k(data: Bytes) -> GroupedWeight:
    """256 inputs: half d, half dmin, 12 bytes of 6-bit scales and minima of 8 groups, 128 bytes; d sc q - dmin mn.

    The products become float16, which moves a value by 2^-11 of its group's range at most.
    """
    n, groups = data.shape[0], data.shape[1] // 144 * 8
    blocks = data.reshape(n, -1, 144)
    low, high, mixed = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    # Of groups 4 to 7 four bits lie together and two above the bits of groups 0 to 3.
    scale = np.concatenate((low & 63, mixed & 15 | low >> 6 << 4), 2).astype(np.float32)
    minimum = np.concatenate((high & 63, mixed >> 4 | high >> 6 << 4), 2).astype(np.float32)
    d = _halves(blocks[:, :, :2])[:, :, None] * scale
    m = _halves(blocks[:, :, 2:4])[:, :, None] * -minimum
    # 32 bytes hold one group in their low and the next in their high bits.
    pairs = blocks[:, :, 16:].reshape(n, -1, 4, 1, GROUP)
    q = np.concatenate((pairs & 15, pairs >> 4), 3).reshape(n, groups * GROUP)
    return GroupedWeight(
        "q4", q, d.astype(np.float16).reshape(n, groups), m.astype(np.float16).reshape(n, groups)
    )


def _halves(data: Bytes) -> NDArray[np.float16]:
    """[n, groups, 2] bytes -> [n, groups]."""
    return np.ascontiguousarray(data).view("<f2")[:, :, 0]


def _nibbles(data: Bytes) -> Bytes:
    """[n, groups, 16] -> [n, groups * 32]: a byte holds input i in its low and input 16 + i in its high bits."""
    n, groups, half = data.shape
    q = np.empty((n, groups, GROUP), np.uint8)
    np.bitwise_and(data, 15, out=q[:, :, :half])
    np.right_shift(data, 4, out=q[:, :, half:])
    return q.reshape(n, groups * GROUP)


# What the kernels can hold without rounding the integers again.
READERS: dict[str, Callable[[Bytes], GroupedWeight]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q8_0": _q8_0,
}
