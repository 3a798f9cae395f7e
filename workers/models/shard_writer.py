"""A model's tensors into safetensors files as they come, so that memory holds one file's worth."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from workers.models.checkpoint import INDEX_NAME

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 * 1024**3


class ShardWriter:
    """A context manager. The files are named, and listed in an index where there are several, when it ends well."""

    def __init__(self, target: Path) -> None:
        """`target` is a directory."""
        self._target = target
        self._shards: list[list[str]] = []  # names of the tensors in each
        self._shard: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._shard and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._shard[name] = tensor
        self._bytes += tensor.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
            self._give_names()

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = self._target / f"shard-{len(self._shards)}.safetensors"
        save_file(self._shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # it is written private; other users of a shared cache read it
        self._shards.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def _give_names(self) -> None:
        """Those that transformers looks for."""
        target, count = self._target, len(self._shards)
        if count == 1:
            (target / "shard-0.safetensors").rename(target / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(self._shards):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (target / f"shard-{number}.safetensors").rename(target / name)
            weight_map |= dict.fromkeys(tensors, name)
        (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
