"""The tensors of a model directory in the order in which a decoder reads them, floats or quantized as a scheme says.

q, k, v and gate, up are fused by rows. Every name and shape is checked from the files' headers before a byte of weights
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.models import mxfp4
from workers.models.checkpoint import TensorHeader, read_headers, read_json
from workers.models.errors import ModelError
from workers.models.expert_form import expert_form
from workers.models.gguf_blocks import GgufBlocks
from workers.models.layer_weights import GroupedAttention, LatentAttention, Layer, Mlp, SparseMlp
from workers.models.quantize import quantize_channels, quantize_q4, quantize_q8
from workers.models.quantized import GROUP, ChannelWeight, GroupedWeight, Quantized, concat_rows, same_form
from workers.models.scheme import FLOATS, Scheme
from workers.models.spec import DecoderSpec, MlaSpec, MoeSpec
from workers.models.stored_form import StoredForm, stored_form
from workers.models.tensor_shapes import EMBEDDING, HEAD, expected_shapes

Matrix = Tensor | GroupedWeight | ChannelWeight  # [out, in]

_FLOAT_DTYPES = {"F16", "BF16", "F32", "F64"}
_MXFP4_DTYPES = {"U8"}
_MXFP4_ENDS = ("_proj_blocks", "_proj_scales")


class WeightSource:
    """Float tensors come as the files hold them (dtype, on the CPU) and may be views of a mapped file."""

    def __init__(self, path: Path, spec: DecoderSpec, scheme: Scheme = FLOATS) -> None:
        """Raises ModelError naming the missing, unexpected or wrongly shaped tensors."""
        self.spec, self.scheme = spec, scheme
        self._headers = read_headers(path)
        self._experts = expert_form(spec, self._headers)
        self._shapes = expected_shapes(spec, self._experts)
        self._form = stored_form(read_json(path / "config.json"))
        self._quantized = _quantized_modules(self._headers, self._shapes, self._form)
        _check(self._headers, spec, self._shapes, self._quantized, self._form)
        kept = scheme.name in ("stored", "int4") and GgufBlocks.are_in(path)
        self._blocks = GgufBlocks(path) if kept else None
        self._open: dict[Path, Any] = {}

    def embedding(self) -> Tensor | None:
        """[vocab, hidden]; None where it is tied: then its rows are the head's."""
        return None if self.spec.tied_embeddings else self._tensor(EMBEDDING + ".weight")

    def layers(self) -> Iterator[Layer[Matrix]]:
        for layer in range(self.spec.num_layers):
            yield self._layer(layer)

    def expert(self, layer: int, logical: int) -> Mlp[Matrix]:
        """One routed expert of the model's layer `layer`, from any thread; nothing else is read."""
        moe, form = self.spec.sparse(layer), self._experts
        if moe is None or not 0 <= logical < moe.num_experts:
            held = "no experts" if moe is None else f"experts 0 to {moe.num_experts - 1}"
            raise ModelError(f"layer {layer} has {held}; asked for was expert {logical}")
        prefix = f"model.layers.{layer}.{form.block}.experts."
        if form.storage == "each":
            names = (form.gate, form.up, form.down)
            gate, up, down = (f"{prefix}{logical}.{name}" for name in names)
            return Mlp(self._matrix(gate, up), None, self._matrix(down), None)
        if form.storage == "fused":
            gate_up, down_rows = (
                self._part(prefix + name, logical) for name in ("gate_up_proj", "down_proj")
            )
            return Mlp(self._in_scheme([gate_up]), None, self._in_scheme([down_rows]), None)
        return Mlp(
            self._in_scheme([_gate_first(self._expert_rows(prefix + "gate_up_proj", logical))]),
            _gate_first(self._part(prefix + "gate_up_proj_bias", logical)),
            self._in_scheme([self._expert_rows(prefix + "down_proj", logical)]),
            self._part(prefix + "down_proj_bias", logical),
        )

    def _expert_rows(self, name: str, logical: int) -> Tensor:
        """[out, in] of one expert of GPT-OSS."""
        if self._experts.storage == "transposed":
            return self._part(name, logical).T.contiguous()
        return mxfp4.widen(self._part(name + "_blocks", logical), self._part(name + "_scales", logical))

    def final_norm(self) -> Tensor:
        """[hidden]."""
        return self._tensor("model.norm.weight")

    def head(self) -> Matrix:
        """[vocab, hidden]."""
        return self._matrix(EMBEDDING if self.spec.tied_embeddings else HEAD, head=True)

    def _layer(self, index: int) -> Layer[Matrix]:
        spec, prefix = self.spec, f"model.layers.{index}."
        moe = spec.sparse(index)
        attention = prefix + "self_attn."
        return Layer(
            input_norm=self._tensor(prefix + "input_layernorm.weight"),
            attention=self._grouped(attention) if spec.mla is None else self._latent(attention, spec.mla),
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight"),
            mlp=self._mlp(prefix + "mlp.", spec.mlp_bias) if moe is None else self._sparse(index, moe),
        )

    def _grouped(self, prefix: str) -> GroupedAttention[Matrix]:
        spec = self.spec
        qkv = [prefix + f"{part}_proj" for part in "qkv"]
        return GroupedAttention(
            qkv=self._matrix(*qkv),
            qkv_bias=self._bias(*qkv) if spec.qkv_bias else None,
            q_norm=self._tensor(prefix + "q_norm.weight") if spec.qk_norm else None,
            k_norm=self._tensor(prefix + "k_norm.weight") if spec.qk_norm else None,
            sinks=self._tensor(prefix + "sinks") if spec.sinks else None,
            output=self._matrix(prefix + "o_proj"),
            output_bias=self._bias(prefix + "o_proj") if spec.output_bias else None,
        )

    def _latent(self, prefix: str, mla: MlaSpec) -> LatentAttention[Matrix]:
        whole = mla.q_lora_rank is None
        return LatentAttention(
            down=self._matrix(prefix + ("q_proj" if whole else "q_a_proj"), prefix + "kv_a_proj_with_mqa"),
            q_norm=None if whole else self._tensor(prefix + "q_a_layernorm.weight"),
            q_up=None if whole else self._matrix(prefix + "q_b_proj"),
            kv_norm=self._tensor(prefix + "kv_a_layernorm.weight"),
            kv_up=self._matrix(prefix + "kv_b_proj"),
            output=self._matrix(prefix + "o_proj"),
        )

    def _mlp(self, prefix: str, bias: bool = False) -> Mlp[Matrix]:
        gate_up = [prefix + "gate_proj", prefix + "up_proj"]
        return Mlp(
            gate_up=self._matrix(*gate_up),
            gate_up_bias=self._bias(*gate_up) if bias else None,
            down=self._matrix(prefix + "down_proj"),
            down_bias=self._bias(prefix + "down_proj") if bias else None,
        )

    def _sparse(self, index: int, moe: MoeSpec) -> SparseMlp[Matrix]:
        prefix = f"model.layers.{index}.{self._experts.block}."
        router, shared = prefix + self._experts.router, prefix + self._experts.shared
        return SparseMlp(
            # A quantized router would choose other experts; the few formats that have one are widened.
            router=to_float(self._stored(router)),
            router_bias=self._tensor(router + ".bias") if moe.router_bias else None,
            correction_bias=self._tensor(router + ".e_score_correction_bias")
            if moe.correction_bias
            else None,
            shared=self._mlp(shared + ".") if moe.shared_intermediate_size else None,
            shared_gate=to_float(self._stored(shared + "_gate")) if moe.shared_gate else None,
            expert=partial(self.expert, index),
        )

    def _bias(self, *modules: str) -> Tensor:
        return torch.cat([self._tensor(module + ".bias") for module in modules])

    def _matrix(self, *modules: str, head: bool = False) -> Matrix:
        """`modules` below each other, in the form of the scheme."""
        # Of a GGUF type that the kernels do not hold (Q6_K, say).
        was_quantized = self._blocks is not None and any(
            self._blocks.was_quantized(module + ".weight") for module in modules
        )
        return self._in_scheme([self._stored(module) for module in modules], head, was_quantized)

    def _in_scheme(self, parts: list[Matrix], head: bool = False, was_quantized: bool = False) -> Matrix:
        if self.scheme.name == "none":
            return _floats(parts)
        if self.scheme.name == "int8":
            if all(isinstance(part, ChannelWeight) for part in parts):
                return _stacked(parts)
            # A scale for each output goes with one scale for each row of activations, and those have outliers: KL to
            # float32 0.039 on SmolLM2, 0.004 with a scale for each 32 inputs on both sides (docs/quantization.md).
            values = _floats(parts)
            return quantize_channels(values) if values.shape[1] % GROUP else quantize_q8(values)
        if self.scheme.name == "int4":
            form = "q8" if head else "q4"
            if all(isinstance(part, GroupedWeight) and part.format == form for part in parts):
                return _stacked(parts)
            return (quantize_q8 if head else quantize_q4)(_floats(parts))
        if same_form(parts):
            return _stacked(parts)
        # Fused of different forms, or of one that the kernels do not hold: eight bits are as good as what was stored.
        was_quantized = was_quantized or any(not isinstance(part, Tensor) for part in parts)
        return (
            quantize_q8(_floats(parts)) if was_quantized and not parts[0].shape[1] % GROUP else _floats(parts)
        )

    def _stored(self, module: str) -> Matrix:
        name = module + ".weight"
        if self._blocks is not None and name in self._blocks:
            return self._blocks.read(name)
        if module not in self._quantized:
            return self._tensor(name)
        assert self._form is not None
        n, k = self._shapes[name]
        return self._form.read(module, n, k, lambda end: self._optional(f"{module}.{end}"))

    def _optional(self, name: str) -> Tensor | None:
        own_bias = name.endswith(".bias") and name in self._shapes  # read apart, as for float matrices
        return self._tensor(name) if name in self._headers and not own_bias else None

    def _tensor(self, name: str) -> Tensor:
        return self._read(name, lambda file: file.get_tensor(name))

    def _part(self, name: str, index: int) -> Tensor:
        """One of the matrices or vectors that tensor `name` holds, and no byte of the others."""
        return self._read(name, lambda file: file.get_slice(name)[index])

    def _read(self, name: str, read: Callable[[Any], Any]) -> Tensor:
        file = self._headers[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            value: Tensor = read(self._open[file])
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {name} cannot be read ({error}); fetch the model again") from error
        return value


def _gate_first(rows: Tensor) -> Tensor:
    """From interleaved rows of gate and up."""
    return torch.cat((rows[0::2], rows[1::2]))


def to_float(matrix: Matrix) -> Tensor:
    """The values of `matrix`: as they are, or float32."""
    return matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix.dequantize())


def _floats(parts: list[Matrix]) -> Tensor:
    return to_float(parts[0]) if len(parts) == 1 else torch.cat([to_float(part) for part in parts])


def _stacked(parts: list[Matrix]) -> Quantized:
    return concat_rows([part for part in parts if not isinstance(part, Tensor)])


def _quantized_modules(
    headers: dict[str, TensorHeader], shapes: dict[str, tuple[int, ...]], form: StoredForm | None
) -> set[str]:
    """The layers that `form` stores. The embedding is looked up by rows and stays as it is in every format."""
    if form is None:
        return set()
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2} - {
        EMBEDDING
    }
    return {module for module in matrices if f"{module}.{form.marker}" in headers}


def _check(
    headers: dict[str, TensorHeader],
    spec: DecoderSpec,
    shapes: dict[str, tuple[int, ...]],
    quantized: set[str],
    form: StoredForm | None,
) -> None:
    floats = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in quantized}
    wanted = dict(floats)
    ignored = {name for name in headers if name.endswith("rotary_emb.inv_freq")}  # buffers of old checkpoints
    if form is not None:
        for module in sorted(quantized):
            n, k = shapes[module + ".weight"]
            wanted |= {f"{module}.{end}": shape for end, shape in form.shapes(n, k).items()}
            ignored |= {f"{module}.{end}" for end in form.optional}
    if spec.tied_embeddings:
        ignored.add("lm_head.weight")
    # Layers behind the last predict further tokens (DeepSeek-V3's MTP); they are not run.
    ignored |= {name for name in headers if _layer_of(name) >= spec.num_layers and spec.mla is not None}
    _refuse("misses", wanted.keys() - headers.keys(), spec)
    _refuse("has unexpected", headers.keys() - wanted.keys() - ignored, spec)
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if headers[name].shape != shape
    ]
    _refuse("has wrongly shaped", wrong, spec)
    dtypes = [
        f"{name} is {headers[name].dtype}"
        for name in floats
        if headers[name].dtype not in (_MXFP4_DTYPES if name.endswith(_MXFP4_ENDS) else _FLOAT_DTYPES)
    ]
    _refuse("has quantized", dtypes, spec)


def _layer_of(name: str) -> int:
    """-1: of none."""
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _refuse(what: str, names: Iterable[str], spec: DecoderSpec) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise ModelError(f"the {spec.architecture} checkpoint {what} tensors: {'; '.join(listed[:8])}{more}")
