"""The tensors of a model directory in the order in which a decoder reads them, floats or quantized as a scheme says.

q, k, v and gate, up are fused by rows. Every name and shape is checked from the files' headers before a byte of weights
is read. A tensor-parallel rank reads its part of the float matrices and no byte of the others; of a quantized one all,
whose parts are not always bytes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.models import mxfp4
from workers.models.checkpoint import read_headers, read_json
from workers.models.checkpoint_tensors import check_tensors, quantized_modules
from workers.models.errors import ModelError
from workers.models.expert_form import expert_form
from workers.models.gguf_blocks import GgufBlocks
from workers.models.layer_weights import GroupedAttention, LatentAttention, Layer, Mlp, SparseMlp
from workers.models.matrix_form import Matrix, MatrixForm, to_float
from workers.models.quantized import cut_columns, cut_rows
from workers.models.scheme import FLOATS, Scheme
from workers.models.sharding import Cuts
from workers.models.spec import DecoderSpec, MlaSpec, MoeSpec
from workers.models.stored_form import stored_form
from workers.models.tensor_shapes import EMBEDDING, HEAD, expected_shapes
from workers.parallel.shard import WHOLE, Shard


@dataclass(frozen=True)
class _Piece:
    """Of a linear layer's matrix: some rows or some columns; None: all of them."""

    module: str
    rows: range | None = None
    columns: range | None = None


class WeightSource:
    """Float tensors come as the files hold them (dtype, on the CPU) and may be views of a mapped file."""

    def __init__(
        self,
        path: Path,
        spec: DecoderSpec,
        scheme: Scheme = FLOATS,
        shard: Shard = WHOLE,
        form: MatrixForm | None = None,
    ) -> None:
        """`spec` is the whole model's, `shard` the part of it that is read. form: of matrices, beyond what the scheme says.

        Raises ModelError naming the missing, unexpected or wrongly shaped tensors.
        """
        self.spec, self.scheme, self._cuts = spec, scheme, Cuts(spec, shard)
        self._in_form = form or MatrixForm(scheme)
        self._headers = read_headers(path)
        self._experts = expert_form(spec, self._headers)
        self._shapes = expected_shapes(spec, self._experts)
        self._form = stored_form(read_json(path / "config.json"))
        self._quantized = quantized_modules(self._headers, self._shapes, self._form)
        check_tensors(self._headers, spec, self._shapes, self._quantized, self._form)
        kept = scheme.name in ("stored", "int4") and GgufBlocks.are_in(path)
        self._blocks = GgufBlocks(path) if kept else None
        self._open: dict[Path, Any] = {}

    def embedding(self) -> Tensor | None:
        """[vocab, hidden] or the shard's rows of it; None where it is tied: then its rows are the head's."""
        if self.spec.tied_embeddings:
            return None
        return self._tensor(EMBEDDING + ".weight", self._cuts.vocabulary())

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
        mine = self._cuts.neurons(moe.intermediate_size)
        if form.storage == "each":
            gate, up, down = (f"{prefix}{logical}.{name}" for name in (form.gate, form.up, form.down))
            return self._gated(gate, up, down, mine)
        if form.storage == "fused":
            gate_up, down_rows = (
                self._part(prefix + name, logical) for name in ("gate_up_proj", "down_proj")
            )
            gate_up, down_rows = _both_halves(gate_up, mine), _columns(down_rows, mine)
            return Mlp(self._in_form.fused([gate_up]), None, self._in_form.fused([down_rows]), None)
        gate_up = _gate_first(self._expert_rows(prefix + "gate_up_proj", logical))
        gate_up_bias = _gate_first(self._part(prefix + "gate_up_proj_bias", logical))
        down_bias = self._part(prefix + "down_proj_bias", logical)
        return Mlp(
            self._in_form.fused([_both_halves(gate_up, mine)]),
            _both_halves(gate_up_bias, mine),
            self._in_form.fused([_columns(self._expert_rows(prefix + "down_proj", logical), mine)]),
            down_bias if self._cuts.adds_bias else torch.zeros_like(down_bias),
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
        """[vocab, hidden] or the shard's rows of it."""
        module = EMBEDDING if self.spec.tied_embeddings else HEAD
        return self._matrix(_Piece(module, self._cuts.vocabulary()), head=True)

    def _layer(self, index: int) -> Layer[Matrix]:
        spec, prefix = self.spec, f"model.layers.{index}."
        moe = spec.sparse(index)
        attention = prefix + "self_attn."
        return Layer(
            input_norm=self._tensor(prefix + "input_layernorm.weight"),
            attention=self._grouped(attention) if spec.mla is None else self._latent(attention, spec.mla),
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight"),
            mlp=self._mlp(prefix + "mlp.", spec.intermediate_size, spec.mlp_bias)
            if moe is None
            else self._sparse(index, moe),
        )

    def _grouped(self, prefix: str) -> GroupedAttention[Matrix]:
        spec, cuts = self.spec, self._cuts
        queries, keys = cuts.query_rows(spec.head_dim), cuts.kv_rows(spec.head_dim)
        qkv = [_Piece(prefix + f"{part}_proj", queries if part == "q" else keys) for part in "qkv"]
        return GroupedAttention(
            qkv=self._matrix(*qkv),
            qkv_bias=self._bias(*qkv) if spec.qkv_bias else None,
            q_norm=self._tensor(prefix + "q_norm.weight") if spec.qk_norm else None,
            k_norm=self._tensor(prefix + "k_norm.weight") if spec.qk_norm else None,
            sinks=self._tensor(prefix + "sinks", cuts.query_rows(1)) if spec.sinks else None,
            output=self._matrix(_Piece(prefix + "o_proj", columns=queries)),
            output_bias=self._bias(_Piece(prefix + "o_proj"))
            if spec.output_bias and cuts.adds_bias
            else None,
        )

    def _latent(self, prefix: str, mla: MlaSpec) -> LatentAttention[Matrix]:
        cuts, whole = self._cuts, mla.q_lora_rank is None
        queries = cuts.query_rows(mla.query_dim)
        # Latents are for all heads: every rank computes and keeps them.
        down = _Piece(prefix + "q_proj", queries) if whole else _Piece(prefix + "q_a_proj")
        return LatentAttention(
            down=self._matrix(down, _Piece(prefix + "kv_a_proj_with_mqa")),
            q_norm=None if whole else self._tensor(prefix + "q_a_layernorm.weight"),
            q_up=None if whole else self._matrix(_Piece(prefix + "q_b_proj", queries)),
            kv_norm=self._tensor(prefix + "kv_a_layernorm.weight"),
            kv_up=self._matrix(_Piece(prefix + "kv_b_proj", cuts.query_rows(mla.nope_dim + mla.value_dim))),
            output=self._matrix(_Piece(prefix + "o_proj", columns=cuts.query_rows(mla.value_dim))),
        )

    def _mlp(self, prefix: str, count: int, bias: bool = False) -> Mlp[Matrix]:
        """Of `count` neurons."""
        gate, up, down = (f"{prefix}{part}_proj" for part in ("gate", "up", "down"))
        return self._gated(gate, up, down, self._cuts.neurons(count), bias)

    def _gated(self, gate: str, up: str, down: str, neurons: range | None, bias: bool = False) -> Mlp[Matrix]:
        gate_up = [_Piece(gate, neurons), _Piece(up, neurons)]
        return Mlp(
            gate_up=self._matrix(*gate_up),
            gate_up_bias=self._bias(*gate_up) if bias else None,
            down=self._matrix(_Piece(down, columns=neurons)),
            down_bias=self._bias(_Piece(down)) if bias and self._cuts.adds_bias else None,
        )

    def _sparse(self, index: int, moe: MoeSpec) -> SparseMlp[Matrix]:
        prefix = f"model.layers.{index}.{self._experts.block}."
        router, shared = prefix + self._experts.router, prefix + self._experts.shared
        return SparseMlp(
            # A quantized router would choose other experts; the few formats that have one are widened.
            router=to_float(self._stored(_Piece(router))),
            router_bias=self._tensor(router + ".bias") if moe.router_bias else None,
            correction_bias=self._tensor(router + ".e_score_correction_bias")
            if moe.correction_bias
            else None,
            shared=self._mlp(shared + ".", moe.shared_intermediate_size)
            if moe.shared_intermediate_size
            else None,
            shared_gate=to_float(self._stored(_Piece(shared + "_gate"))) if moe.shared_gate else None,
            expert=partial(self.expert, index),
        )

    def _bias(self, *pieces: _Piece) -> Tensor:
        return torch.cat([self._tensor(piece.module + ".bias", piece.rows) for piece in pieces])

    def _matrix(self, *pieces: _Piece, head: bool = False) -> Matrix:
        """`pieces` below each other, in the form of the scheme."""
        # Of a GGUF type that the kernels do not hold (Q6_K, say).
        was_quantized = self._blocks is not None and any(
            self._blocks.was_quantized(piece.module + ".weight") for piece in pieces
        )
        return self._in_form.fused([self._stored(piece) for piece in pieces], head, was_quantized)

    def _stored(self, piece: _Piece) -> Matrix:
        module, name = piece.module, piece.module + ".weight"
        if self._blocks is not None and name in self._blocks:
            return _cut(self._blocks.read(name), piece)
        if module not in self._quantized:
            return self._tensor(name, piece.rows, piece.columns)
        assert self._form is not None
        n, k = self._shapes[name]
        found = self._form.read(module, n, k, lambda end: self._optional(f"{module}.{end}"))
        return _cut(self._in_form.stored(found), piece)

    def _optional(self, name: str) -> Tensor | None:
        own_bias = name.endswith(".bias") and name in self._shapes  # read apart, as for float matrices
        return self._tensor(name) if name in self._headers and not own_bias else None

    def _tensor(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        if rows is not None:
            return self._read(name, lambda file: file.get_slice(name)[rows.start : rows.stop])
        if columns is not None:
            return self._read(name, lambda file: file.get_slice(name)[:, columns.start : columns.stop])
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


def _both_halves(rows: Tensor, mine: range | None) -> Tensor:
    """`mine` of the gate's rows, then of up's."""
    if mine is None:
        return rows
    return torch.cat([half[mine.start : mine.stop] for half in rows.chunk(2)])


def _columns(rows: Tensor, mine: range | None) -> Tensor:
    return rows if mine is None else rows[:, mine.start : mine.stop].contiguous()


def _cut(matrix: Matrix, piece: _Piece) -> Matrix:
    if isinstance(matrix, Tensor):
        rows = matrix if piece.rows is None else matrix[piece.rows.start : piece.rows.stop]
        return _columns(rows, piece.columns)
    whole = matrix if piece.rows is None else cut_rows(matrix, piece.rows)
    if piece.columns is None:
        return whole
    cut = cut_columns(whole, piece.columns)
    # A scale's group lies on two ranks.
    return _columns(to_float(whole), piece.columns) if cut is None else cut
