"""bf16 safetensors into GGUF files for llama.cpp, so that it serves the weights that everybody serves.

Metadata and vocabulary are those of the GGUF that the model came in. Norms stay float32. As llama.cpp's own quantize
tool does for this model, the head (here the embedding too) of a 4-bit file is Q8_0: 576 columns do not fit Q6_K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors import safe_open

from workers.models.checkpoint import weight_files

Kind = Literal["BF16", "Q8_0", "Q4_0", "Q4_1"]

_FILE_TYPES = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1"}
_TIED_HEAD = "token_embd.weight"
_HEADS = (_TIED_HEAD, "output.weight")
_ROTATED = {".attn_q.": "attention.head_count", ".attn_k.": "attention.head_count_kv"}


def export_gguf(origin: Path, weights: Path, target: Path, kind: Kind) -> None:
    """Write `target` with the tensors of the model directory `weights` and the metadata of the GGUF file `origin`."""
    import gguf

    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; possible are {', '.join(get_args(Kind))}")
    reader = gguf.GGUFReader(origin)
    architecture = str(_metadata(reader, "general.architecture"))
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value_type, item_type = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), value_type, item_type)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA, int(_metadata(reader, f"{architecture}.block_count"))
    )
    for file in weight_files(weights):
        with safe_open(file, framework="pt") as tensors:
            for hf_name in tensors.keys():  # noqa: SIM118, it is no dict
                found = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
                if found is None:
                    raise ValueError(f"{hf_name} has no name in GGUF")
                value = tensors.get_tensor(hf_name).float().numpy()
                for part, heads_key in _ROTATED.items():
                    if part in found:
                        value = permuted(value, int(_metadata(reader, f"{architecture}.{heads_key}")))
                _add(writer, found, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, value: np.ndarray, kind: Kind) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    chosen: str = kind
    if value.ndim == 1:
        chosen = "F32"
    elif name in _HEADS and kind.startswith("Q4"):
        chosen = "Q8_0"
    tensor_type = GGMLQuantizationType[chosen]
    writer.add_tensor(name, quantize(value, tensor_type), raw_dtype=tensor_type)


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs: GGUF's `llama` rotates neighbours, Hugging Face's halves.

    value [heads * head_dim, in]; the inverse of what workers/models/gguf_import does.
    """
    return np.ascontiguousarray(
        value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    )


def _metadata(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no metadata {key}")
    return field.contents()
