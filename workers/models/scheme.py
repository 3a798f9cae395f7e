"""How the weights of a model are served: as floats, as the checkpoint stores them, or quantized on loading."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from workers.config import Quantization
from workers.models.checkpoint import read_json
from workers.models.errors import ModelError
from workers.models.gguf_blocks import GgufBlocks
from workers.models.quantized import GROUP
from workers.models.spec import DecoderSpec

SchemeName = Literal["none", "stored", "int8", "int4", "fp8"]

# Enters the fingerprint of quantized weights, and so the hashes of KV blocks: raise it when a quantizer's result or
# the reading of a stored format changes.
VALUES_VERSION = 2


@dataclass(frozen=True)
class Scheme:
    """none: floats. stored: every matrix as the checkpoint holds it. int8: a scale for each 32 inputs.
    int4: a scale and minimum for each 32 inputs; the head in 8 bits by groups of 32, because four cost it quality.
    fp8: float8 (e4m3) with a scale for each output; the head as in int4; GPUs alone.
    """

    name: SchemeName


FLOATS = Scheme("none")


def choose_scheme(wanted: str, checkpoint: Path) -> Scheme:
    """`wanted` is the configured quantization, `checkpoint` a model directory. Raises ModelError."""
    if wanted not in get_args(Quantization):
        raise ModelError(
            f"quantization {wanted!r} is not known; allowed are {', '.join(get_args(Quantization))}"
        )
    config = read_json(checkpoint / "config.json")
    spec = DecoderSpec.from_config(config)
    if wanted == "int4":
        _check_groups(spec)
        return Scheme("int4")
    if wanted in ("auto", "stored"):
        # Integer products round activations too. Whoever names a GPTQ or AWQ checkpoint has chosen that; a GGUF is also
        # how float models are shipped, and the default model is one: it answers better in floats.
        asked_of_gguf = wanted == "stored" and GgufBlocks.are_in(checkpoint)
        stored = config.get("quantization_config") or asked_of_gguf
        return Scheme("stored") if stored else FLOATS
    if wanted == "int8":
        return Scheme("int8")
    return Scheme("fp8") if wanted == "fp8" else FLOATS


def _check_groups(spec: DecoderSpec) -> None:
    widths = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads * head_dim": spec.num_heads * spec.head_dim,
    }
    if spec.moe is not None:
        widths["experts' intermediate size"] = spec.moe.intermediate_size
        widths["shared experts' intermediate size"] = spec.moe.shared_intermediate_size
    if spec.mla is not None:
        del widths["num_attention_heads * head_dim"]
        widths["num_attention_heads * v_head_dim"] = spec.num_heads * spec.mla.value_dim
        widths["q_lora_rank"], widths["kv_lora_rank"] = spec.mla.q_lora_rank or 0, spec.mla.kv_lora_rank
    for name, width in widths.items():
        if width % GROUP:
            raise ModelError(
                f"quantization int4 shares a scale among {GROUP} inputs, but the model's {name} is {width}; "
                "use int8 or none"
            )


def weights_fingerprint(model_fingerprint: str, scheme: Scheme) -> str:
    """Hex; names the values that are computed with. KV blocks of one model under two schemes differ, so this does."""
    if scheme == FLOATS:
        return model_fingerprint
    return hashlib.sha256(f"{model_fingerprint}/{scheme.name}/{VALUES_VERSION}".encode()).hexdigest()
