"""A model directory as files: which hold weights, what their headers say, and the model's fingerprint. No torch."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.models.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
FINGERPRINT_EDGE_BYTES = (
    64 * 1024
)  # hashed at both ends of each weights file: a huge model takes milliseconds

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}


@dataclass(frozen=True)
class TensorHeader:
    file: Path
    dtype: str  # as safetensors names it: "F32", "BF16", ...
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError when the file is absent or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}; a Hugging Face model directory needs one"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises ModelError when there are none or one is missing."""
    single, index = path / "model.safetensors", path / INDEX_NAME
    if index.is_file():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise ModelError(f"{index} has no weight_map")
        files = [path / str(name) for name in sorted(set(mapping.values()))]
        for file in files:
            # A shard's name is the model's, not ours: it must not lead out of the directory.
            if file.parent != path:
                raise ModelError(f"{index} names a file outside its directory: {file.name!r}")
            if not file.is_file():
                raise ModelError(f"{file} is named by {INDEX_NAME} but is not there; fetch the model again")
        return files
    if single.is_file():
        return [single]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelError(
            f"{path} holds pickled weights only. Pickles can run code and are never loaded; only safetensors and GGUF "
            "are read: convert the model to safetensors"
        )
    raise ModelError(f"{path} holds no weights; only safetensors and GGUF are read")


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model directory by name. Raises ModelError for a truncated or damaged file."""
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(path):
        for name, entry in _header(file)[0].items():
            tensors[name] = TensorHeader(file, str(entry["dtype"]), tuple(entry["shape"]))
    return tensors


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """(tensor entries, offset of the data) of one file, whose length must be what its header says."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            items = 1
            for extent in entry["shape"]:
                items *= extent
            if last - first != items * _ITEM_BYTES.get(entry["dtype"], 1) and entry["dtype"] in _ITEM_BYTES:
                raise ValueError(f"{name} has {last - first} bytes, which is not its shape")
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}; fetch it again") from error
    return header, 8 + length


def fingerprint(path: Path) -> str:
    """Hex SHA-256 that names the model's weights and shape, equal wherever the same files lie.

    Over config.json in canonical form, and of each weights file the tensors' names, shapes and dtypes and the first
    and last 64 KiB of data.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        # Compact and sorted: neither white space nor the order of keys changes what a model is.
        data = (
            value
            if isinstance(value, bytes)
            else json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        )
        digest.update(struct.pack("<Q", len(data)) + data)

    add(read_json(path / "config.json"))
    for file in weight_files(path):
        header, start = _header(file)
        add([[name, entry["dtype"], entry["shape"]] for name, entry in sorted(header.items())])
        with file.open("rb") as stream:
            stream.seek(start)
            add(stream.read(FINGERPRINT_EDGE_BYTES))
            stream.seek(max(start, file.stat().st_size - FINGERPRINT_EDGE_BYTES))
            add(stream.read(FINGERPRINT_EDGE_BYTES))
    return digest.hexdigest()
