"""What `DecoderSpec` has no word for, read through transformers' own configuration: can it be run, and what is its size?

Whether a family fits is asked of its class, not of a list of names: attention must go through transformers' attention
interface, and keys and values must be all that a token leaves behind. `fallback.load_fallback` then tries the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.models.checkpoint import read_json
from workers.models.errors import ModelError, NotExpressed
from workers.models.spec import DecoderSpec

# What transformers raises for a config or checkpoint that it cannot read, and for a package that a model needs.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError)

_KINDS = ("full_attention", "sliding_attention")  # of layers
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class FallbackSpec:
    architecture: str  # config.json's model_type
    class_name: str  # of transformers
    reason: str  # why DecoderSpec does not do
    vocab_size: int
    max_position: int  # tokens
    named_position: int | None  # tokens that the config names, where longrope allows fewer
    eos_token_ids: tuple[int, ...]  # the class's, for a checkpoint that names none


def read_spec(path: Path) -> DecoderSpec | FallbackSpec:
    """Of a model directory. Raises ModelError, with both reasons where neither can run it."""
    config = read_json(path / "config.json")
    try:
        return DecoderSpec.from_config(config)
    except NotExpressed as error:
        try:
            return _read_fallback(path, config, str(error))
        except ModelError as refused:
            raise ModelError(f"{error}. Nor can it run through transformers: {refused}") from error


def _read_fallback(path: Path, config: dict[str, Any], reason: str) -> FallbackSpec:
    """Raises ModelError with what is in the way."""
    if config.get("quantization_config"):
        raise ModelError("its weights are quantized, which only the architectures above are read as")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    architecture = config.get("model_type")
    if architecture not in CONFIG_MAPPING:
        own = (
            "; it brings code of its own (auto_map), which is never executed" if "auto_map" in config else ""
        )
        raise ModelError(f"it does not know model_type {architecture!r}{own}")
    try:
        # Never trust_remote_code: a model directory is data.
        whole = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (*UNREADABLE, StrictDataclassError) as error:
        raise ModelError(f"config.json is refused: {error}") from error
    if whole.is_encoder_decoder:
        raise ModelError(f"{architecture} is an encoder-decoder; only decoders are served")
    if type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"it has no causal language model for {architecture}")
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)]
    except UNREADABLE as error:
        raise ModelError(f"{architecture} cannot be imported: {error}") from error
    text = whole.get_text_config(decoder=True)
    if obstacle := _obstacle(text, model_class, config.get("architectures")):
        raise ModelError(obstacle)
    max_position, named_position = _max_position(text)
    return FallbackSpec(
        architecture=str(architecture),
        class_name=model_class.__name__,
        reason=reason,
        vocab_size=_vocab_size(text),
        max_position=max_position,
        named_position=named_position,
        eos_token_ids=_eos_token_ids(text),
    )


def _obstacle(text: Any, model_class: Any, stored: Any) -> str | None:
    """Why models of this class cannot have a paged KV cache, as far as can be told without weights."""
    kinds = getattr(text, "layer_types", None) or ()
    other = sorted({str(kind) for kind in kinds if kind not in _KINDS})
    if stored and model_class.__name__ not in stored:
        return f"the checkpoint is of {', '.join(map(str, stored))}, not of {model_class.__name__}"
    if text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        return f"{text.model_type} places tokens by ALiBi, which paged attention does not compute"
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        return f"{text.model_type} has cross-attention"
    if model_class._is_stateful:
        return f"{text.model_type} keeps a recurrent state beside keys and values, which blocks do not hold"
    if other:
        return f"{text.model_type} has layers of {', '.join(other)}; supported are {', '.join(_KINDS)}"
    if getattr(text, "num_kv_shared_layers", 0):
        return f"layers of {text.model_type} share keys and values (num_kv_shared_layers)"
    if not model_class._can_set_attn_implementation():
        return f"attention of {text.model_type} does not go through transformers' attention interface"
    return None


def _vocab_size(text: Any) -> int:
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"config.json: vocab_size must be a positive integer, not {size!r}")
    return size


def _max_position(text: Any) -> tuple[int, int | None]:
    """Tokens that can be served, and those that the config names where longrope allows fewer."""
    found = next((value for name in _LENGTHS if (value := getattr(text, name, None)) is not None), None)
    if not isinstance(found, int) or found < 1:
        raise ModelError(f"config.json does not tell the context length: {_LENGTHS[0]} is {found!r}")
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for one in [rope, *by_layer_type]:
        original = one.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        # Beyond it the angles of *all* tokens change, those of cached keys too, with the longest of a batch.
        if one.get("rope_type") == "longrope" and original and original < found:
            return int(original), found
    return found, None


def _eos_token_ids(text: Any) -> tuple[int, ...]:
    value = getattr(text, "eos_token_id", None)
    found = value if isinstance(value, list) else [value]
    return tuple(token for token in found if isinstance(token, int) and token >= 0)
