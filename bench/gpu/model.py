"""A decoder with random weights as files, so that what is measured loads it as it loads any other model.

python -m bench.gpu.model [--rehearse] [DIRECTORY]     writes it and prints the directory: of memory, where there is room

The 8B class: the shapes of Llama 3 8B, 16 GB in bfloat16. Weights repeat one stretch of noise whose length no row
divides, which takes seconds to write; their scale keeps activations in range through all layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.models.catalog import PreparedModel
from workers.models.checkpoint import read_json
from workers.models.spec import DecoderSpec
from workers.models.tensor_shapes import EMBEDDING, expected_shapes

LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
TINY: Mapping[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}
_NOISE, _LITTLE_NOISE = 16_777_259, 65_537  # primes
_GAIN = 0.5
_THREADS = 8  # writing to memory is mostly the kernel's finding of pages


def write_model(path: Path, config: Mapping[str, Any]) -> Path:
    """config.json and model.safetensors in bfloat16."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n")
    shapes = expected_shapes(DecoderSpec.from_config(dict(config)))
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    packed = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    packed += b" " * (-len(packed) % 8)
    length = _NOISE if end > 1 << 26 else _LITTLE_NOISE
    noise = torch.randn(length, generator=torch.Generator().manual_seed(0))
    scaled = {
        scale: (noise * scale).bfloat16()
        for scale in {_scale(name, shape) for name, shape in shapes.items() if len(shape) > 1}
    }
    ones = torch.ones(length, dtype=torch.bfloat16)  # for norms
    with (path / "model.safetensors").open("wb") as file, ThreadPoolExecutor(_THREADS) as pool:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.flush()

        def fill(name: str) -> None:
            begin, end = header[name]["data_offsets"]
            values = ones if len(shapes[name]) == 1 else scaled[_scale(name, shapes[name])]
            while begin < end:
                first = begin // 2 % length
                piece = _bytes(values[first : first + (end - begin) // 2])
                begin += os.pwrite(file.fileno(), piece, 8 + len(packed) + begin)

        list(pool.map(fill, shapes))
    return path


def _scale(name: str, shape: tuple[int, ...]) -> float:
    return 1.0 if name.startswith(EMBEDDING) else _GAIN / math.sqrt(shape[-1])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def model_bytes(config: Mapping[str, Any]) -> int:
    return sum(
        2 * math.prod(shape) for shape in expected_shapes(DecoderSpec.from_config(dict(config))).values()
    )


def prepared(path: Path) -> PreparedModel:
    """Without a tokenizer, and without an end token: every request writes all its tokens."""
    spec = DecoderSpec.from_config(read_json(path / "config.json"))
    return PreparedModel(path, "random", "random", spec.max_position, spec.vocab_size, ())


def place(config: Mapping[str, Any]) -> Path:
    """A new directory: in memory where it fits twice (loading it fills the page cache anyway), else among files."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 2 * model_bytes(config)
    return Path(tempfile.mkdtemp(prefix="headrace-model-", dir=memory if fits else None))


@contextmanager
def model_at(path: Path | None, config: Mapping[str, Any]) -> Iterator[Path]:
    """The given one, or one written for the while."""
    if path is not None:
        yield path
        return
    own = place(config)
    try:
        yield write_model(own, config)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def main() -> None:
    given = argparse.ArgumentParser(
        prog="python -m bench.gpu.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given.add_argument("directory", type=Path, nargs="?")
    given.add_argument("--rehearse", action="store_true", help="a tiny one")
    options = given.parse_args()
    config = TINY if options.rehearse else LLAMA_8B
    print(write_model(options.directory or place(config), config))


if __name__ == "__main__":
    main()
