"""What a GGUF's metadata say of a model, in Hugging Face's words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workers.models.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # as GGUF names them; Mistral is "llama" there
CONTROL = 3  # token type of a special token
# Ends of a turn that files without an eot id still mean; taken only when the chat template writes them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>")
_PLAIN_DTYPES = {"F32": "float32", "F16": "float16"}


class GgufConfig:
    """Metadata by key, each read once. Raises ModelError for what this repository cannot run."""

    def __init__(self, file_name: str, reader: GGUFReader) -> None:
        self._file_name, self._reader = file_name, reader
        self._values: dict[str, Any] = {}
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{file_name}: architecture {self.architecture!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)} (dense; Mistral comes as llama)"
            )

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self._values:
            field = self._reader.get_field(key)
            try:
                self._values[key] = None if field is None else field.contents()
            except (ValueError, IndexError) as error:
                raise ModelError(f"{self._file_name}: metadata {key} cannot be read: {error}") from error
        value = self._values[key]
        return default if value is None else value

    def _own(self, key: str, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", default)

    def _need(self, key: str) -> Any:
        value = self._own(key)
        if value is None:
            raise ModelError(f"{self._file_name} has no metadata {self.architecture}.{key}")
        return value

    @property
    def tokens(self) -> list[str]:
        tokens = self.get("tokenizer.ggml.tokens")
        if not tokens:
            raise ModelError(f"{self._file_name} holds no vocabulary; a model needs its tokenizer")
        return list(tokens)

    @property
    def chat_template(self) -> str | None:
        template = self.get("tokenizer.chat_template")
        return None if template is None else str(template)

    def config(self) -> dict[str, Any]:
        """config.json."""
        for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            if isinstance(self._own(key), list):
                raise ModelError(f"{self._file_name}: {key} differs by layer, which is not supported")
        if self._own("expert_count"):
            raise ModelError(f"{self._file_name} is a mixture of experts; only dense models are supported")
        shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in self._reader.tensors}
        hidden, heads = self._need("embedding_length"), self._need("attention.head_count")
        kv_heads = self._own("attention.head_count_kv", heads)
        head_dim = self._own("attention.key_length", hidden // heads)
        if self._own("attention.value_length", head_dim) != head_dim:
            raise ModelError(f"{self._file_name}: keys and values of different length are not supported")
        if self._own("rope.dimension_count", head_dim) != head_dim:
            raise ModelError(f"{self._file_name}: RoPE over a part of the head is not supported")
        window = self._own("attention.sliding_window")
        model_type = "mistral" if self.architecture == "llama" and window else self.architecture
        eos = self.eos_token_ids()
        config: dict[str, Any] = {
            "architectures": [_CLASSES[model_type]],
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": self._need("feed_forward_length"),
            "num_hidden_layers": self._need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._need("context_length"),
            "rms_norm_eps": _shortest(self._need("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope(),
            "vocab_size": shapes.get("token_embd.weight", (0, len(self.tokens)))[-1],
            # llama.cpp stores the output projection only where it is not the embedding.
            "tie_word_embeddings": "output.weight" not in shapes,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": eos[0] if eos else None,
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
            "dtype": self._dtype(),
        }
        if model_type == "mistral":
            config["sliding_window"] = window
        elif model_type == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in shapes
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
        elif model_type == "qwen3":
            config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        return config

    def generation_config(self) -> dict[str, Any]:
        ids = {
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        return {
            "eos_token_id": self.eos_token_ids(),
            **{key: value for key, value in ids.items() if value is not None},
        }

    def eos_token_ids(self) -> list[int]:
        """Where generation ends: eos, eot, and the turn ends that the chat template writes. eos first."""
        found = [self.get("tokenizer.ggml.eos_token_id"), self.get("tokenizer.ggml.eot_token_id")]
        tokens, types = self.tokens, self.get("tokenizer.ggml.token_type", [])
        template = self.chat_template or ""
        for index, kind in enumerate(types):
            if kind == CONTROL and tokens[index] in _TURN_ENDS and tokens[index] in template:
                found.append(index)
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    def _dtype(self) -> str:
        """What keeps the file's precision: that of its matrices if plain, bfloat16 for anything quantized."""
        kinds = {tensor.tensor_type.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        return _PLAIN_DTYPES.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"

    def _rope(self) -> dict[str, Any]:
        theta = _shortest(self._own("rope.freq_base", 10000.0))
        kind = self._own("rope.scaling.type", "none")
        factor = self._own("rope.scaling.factor", self._own("rope.scale_linear", 1.0))
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                return self._llama3(theta, [float(value) for value in tensor.data])
        if kind in ("none", "linear"):
            # Files from before the type key scale linearly where they have a factor.
            if factor in (0.0, 1.0):
                return {"rope_type": "default", "rope_theta": theta}
            return {"rope_type": "linear", "rope_theta": theta, "factor": _shortest(factor)}
        if kind != "yarn":
            raise ModelError(f"{self._file_name}: RoPE scaling {kind!r} is not supported")
        rope = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": _shortest(factor),
            "original_max_position_embeddings": self._need("rope.scaling.original_context_length"),
        }
        for key in ("beta_fast", "beta_slow"):
            value = self._own(f"rope.scaling.yarn_{key}")
            if value is not None:
                rope[key] = _shortest(value)
        attention = self._own("rope.scaling.yarn_attn_factor", self._own("rope.scaling.attn_factor"))
        if attention is not None:
            # llama.cpp multiplies its attention factor with YaRN's own magnitude scale.
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        return rope

    def _llama3(self, theta: float, divisors: list[float]) -> dict[str, Any]:
        """Llama 3's scaling is stored as one divisor per frequency; find the parameters that give these."""
        import torch

        from workers.models.rope import inverse_frequencies
        from workers.models.spec import RopeSpec

        head_dim = 2 * len(divisors)
        plain, _ = inverse_frequencies(RopeSpec("default", theta), head_dim)
        factor = max(divisors)
        rope = RopeSpec("llama3", theta, factor, 8192, 1.0, 4.0)  # every published Llama 3 has these three
        scaled, _ = inverse_frequencies(rope, head_dim)
        if not torch.allclose(scaled, plain / torch.tensor(divisors), rtol=1e-3):
            raise ModelError(
                f"{self._file_name}: rope_freqs.weight is not Llama 3's scaling; others are not supported"
            )
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": _shortest(factor),
            "original_max_position_embeddings": rope.original_max_position,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
