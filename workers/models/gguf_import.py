"""A GGUF file into a Hugging Face directory: config.json, safetensors, tokenizer, generation_config.json.

Tensors are dequantized to bfloat16 (float16 and float32 files keep their dtype), one at a time, so that memory holds
one shard. Quantized matrices that the kernels can hold are kept as they are too, see `gguf_blocks`. For architecture
`llama`, llama.cpp's converter reorders the rows of q and k for its interleaved RoPE; that is undone here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.models.errors import ModelError
from workers.models.gguf_blocks import PLAIN_TYPES, READERS, KeptMatrix, write_blocks
from workers.models.gguf_config import GgufConfig
from workers.models.gguf_header import check_metadata
from workers.models.gguf_tokenizer import write_tokenizer
from workers.models.shard_writer import ShardWriter
from workers.models.spec import DecoderSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_WEIGHTS = {"rope_freqs.weight"}  # enters config.json as RoPE parameters


def import_gguf(source: Path, target: Path, say: Say) -> None:
    """Write `source` as a model directory into `target`, which exists and is empty. Raises ModelError."""
    reader = _open(source)
    metadata = GgufConfig(source.name, reader)
    config = metadata.config()
    spec = DecoderSpec.from_config(config)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "generation_config.json").write_text(json.dumps(metadata.generation_config(), indent=2) + "\n")
    write_tokenizer(source, metadata, target)
    names = _names(source, reader, spec)
    _write_tensors(source, reader, names, spec, config["dtype"], target, say)
    _write_blocks(reader, names, spec, target)


def _open(source: Path) -> GGUFReader:
    from gguf import GGUFReader

    check_metadata(source)
    try:
        return GGUFReader(source)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise ModelError(f"{source} is not a whole GGUF file ({error}); fetch it again") from error


def _hf_name(name: str) -> str | None:
    """The safetensors name of a GGUF tensor, None where there is none."""
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return None


def _names(source: Path, reader: GGUFReader, spec: DecoderSpec) -> dict[str, str]:
    """GGUF name -> safetensors name of every weight."""
    names = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is not None:
            names[tensor.name] = name
        elif tensor.name not in _NOT_WEIGHTS:
            raise ModelError(
                f"{source.name} has a tensor {tensor.name!r} that {spec.architecture} does not know"
            )
    return names


def _write_tensors(
    source: Path,
    reader: GGUFReader,
    names: dict[str, str],
    spec: DecoderSpec,
    dtype_name: str,
    target: Path,
    say: Say,
) -> None:
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    total = sum(int(tensor.n_elements) for tensor in reader.tensors) or 1
    done = said = 0
    with ShardWriter(target) as writer:
        for tensor in reader.tensors:
            done += int(tensor.n_elements)
            if tensor.name not in names:
                continue
            writer.add(names[tensor.name], _dequantized(source, tensor, spec).to(dtype))
            if (percent := done * 100 // total) >= said + 20:
                said = percent - percent % 20
                say(f"converting {source.name} ... {said}%")


def _dequantized(source: Path, tensor: Any, spec: DecoderSpec) -> torch.Tensor:
    """float32, in Hugging Face's order of rows."""
    import torch
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
    except (NotImplementedError, ValueError) as error:
        kind = tensor.tensor_type.name
        raise ModelError(f"{source.name}: {tensor.name} ({kind}) cannot be dequantized: {error}") from error
    return torch.tensor(_in_order(values, tensor.name, spec), dtype=torch.float32)


def _write_blocks(reader: GGUFReader, names: dict[str, str], spec: DecoderSpec, target: Path) -> None:
    matrices = [tensor for tensor in reader.tensors if tensor.name in names and len(tensor.shape) == 2]
    types = {names[tensor.name]: str(tensor.tensor_type.name) for tensor in matrices}
    if set(types.values()) <= set(PLAIN_TYPES):
        return
    kept = [
        KeptMatrix(names[t.name], t.data.shape, lambda t=t: _in_order(t.data, t.name, spec))  # type: ignore[misc]
        for t in matrices
        if t.tensor_type.name in READERS
    ]
    write_blocks(target, kept, types)


def _in_order(rows: np.ndarray, gguf_name: str, spec: DecoderSpec) -> np.ndarray:
    """Undo `permute` of llama.cpp's convert_hf_to_gguf.py: rows of a head back from pairs to halves."""
    if spec.architecture not in ("llama", "mistral"):
        return rows
    if ".attn_q." in gguf_name:
        heads = spec.num_heads
    elif ".attn_k." in gguf_name:
        heads = spec.num_kv_heads
    else:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
