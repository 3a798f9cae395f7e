"""A decoder's weights as the native kernels read them, and the structs that say so."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.layout import DEPTH, PANEL, round_up
from kernels.cpu.structures import EmbeddingKind, Expert, Format, Layer, Matrix, Model, ModelShape, Moe

if TYPE_CHECKING:
    from kernels.reference_moe import Routing


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight matrix in panels, see matrix.h. Arrays may be views of a mapped file; they are kept alive here."""

    format: Format
    n: int  # features out, those that only pad heads or halves included
    k: int
    data: NDArray[np.uint8]
    scale: NDArray[np.float32] | None = None  # [n_pad], I8 only
    bias: NDArray[np.float32] | None = None  # [n_pad]

    @property
    def n_pad(self) -> int:
        return round_up(self.n, PANEL)

    @property
    def k_pad(self) -> int:
        return round_up(self.k, DEPTH)

    @property
    def form(self) -> tuple[Format, int, int, bool]:
        return self.format, self.n, self.k, self.bias is not None

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        return tuple(array for array in (self.data, self.scale, self.bias) if array is not None)

    def with_arrays(self, arrays: Sequence[NDArray[Any]]) -> PackedMatrix:
        """This matrix with others' values: `arrays` as `self.arrays`."""
        rest = iter(arrays)
        return PackedMatrix(
            format=self.format,
            n=self.n,
            k=self.k,
            data=next(rest),
            scale=None if self.scale is None else next(rest),
            bias=None if self.bias is None else next(rest),
        )

    def struct(self) -> Matrix:
        return Matrix(
            format=int(self.format),
            n=self.n,
            k=self.k,
            n_pad=self.n_pad,
            k_pad=self.k_pad,
            data=address(self.data),
            scale=address(self.scale),
            bias=address(self.bias),
        )


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """One expert of one layer: `gate_up` alternates 32 gate and 32 up columns, as a dense layer's does."""

    gate_up: PackedMatrix
    down: PackedMatrix

    def struct(self) -> Expert:
        return Expert(gate_up=self.gate_up.struct(), down=self.down.struct())

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What it is made of, always in the same order: how an expert travels."""
        return (*self.gate_up.arrays, *self.down.arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def same_form(self, other: PackedExpert) -> bool:
        """Whether one can take the other's place."""
        return self.gate_up.form == other.gate_up.form and self.down.form == other.down.form

    def with_arrays(self, arrays: Sequence[NDArray[Any]]) -> PackedExpert:
        """An expert of this one's form from `arrays`, which are as another's `arrays`. Raises ValueError."""
        given, wanted = ([(a.dtype, a.shape) for a in each] for each in (arrays, self.arrays))
        if given != wanted:
            raise ValueError(f"an expert is made of arrays {wanted}, not {given}")
        cut = len(self.gate_up.arrays)
        return PackedExpert(
            self.gate_up.with_arrays(arrays[:cut]),
            self.down.with_arrays(arrays[cut:]),
        )


@dataclass(frozen=True, eq=False)
class PackedMoe:
    """The experts of one layer, all of them: pages of a mapped file that nobody reads take no memory."""

    routing: Routing
    router: PackedMatrix  # F32 [num_experts, hidden]; one row more where the shared expert is gated
    correction_bias: NDArray[np.float32] | None  # [num_experts]
    experts: Sequence[PackedExpert]  # [num_experts]
    shared: PackedExpert | None = None
    shared_gated: bool = False
    clamped: tuple[float, float] | None = None  # alpha and limit of GPT-OSS's gate; None: silu(gate) * up


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """Norm weights are float32. `qkv` has padded heads; `gate_up` alternates 32 gate and 32 up columns: model.h."""

    input_norm: NDArray[np.float32]
    q_norm: NDArray[np.float32] | None
    k_norm: NDArray[np.float32] | None
    mlp_norm: NDArray[np.float32]
    qkv: PackedMatrix
    output: PackedMatrix
    gate_up: PackedMatrix | None
    down: PackedMatrix | None
    window: int | None
    moe: PackedMoe | None = None  # in the place of gate_up and down
    norm_whole: bool = False  # q_norm and k_norm are of all heads together: [heads * head_dim]


@dataclass(frozen=True, eq=False)
class PackedModel:
    """Everything that a step reads besides the KV cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    norm_eps: float
    scale: float  # of attention scores
    embedding: (
        NDArray[np.float32] | NDArray[np.uint16] | None
    )  # float32 or bfloat16 bits; None: rows of `head`
    layers: Sequence[PackedLayer]
    final_norm: NDArray[np.float32]
    cos: NDArray[np.float32]  # [max_positions, head_dim / 2]
    sin: NDArray[np.float32]
    head: PackedMatrix


def model_struct(model: PackedModel, moes: Mapping[int, Moe]) -> Model:
    """Points to arrays that `model` keeps alive. `moes`: by layer, of those with experts."""
    layers = (Layer * len(model.layers))(
        *(
            Layer(
                input_norm=address(layer.input_norm),
                q_norm=address(layer.q_norm),
                k_norm=address(layer.k_norm),
                mlp_norm=address(layer.mlp_norm),
                qkv=layer.qkv.struct(),
                output=layer.output.struct(),
                gate_up=Matrix() if layer.gate_up is None else layer.gate_up.struct(),
                down=Matrix() if layer.down is None else layer.down.struct(),
                moe=None if index not in moes else ctypes.pointer(moes[index]),
                window=layer.window or 0,
                norm_whole=layer.norm_whole,
            )
            for index, layer in enumerate(model.layers)
        )
    )
    if model.embedding is None:
        kind = EmbeddingKind.HEAD
    else:
        kind = EmbeddingKind.F32 if model.embedding.dtype == np.float32 else EmbeddingKind.BF16
    shape = ModelShape(
        num_layers=len(model.layers),
        hidden=model.hidden,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate,
        vocab=model.vocab,
        max_positions=len(model.cos),
        norm_eps=model.norm_eps,
        scale=model.scale,
        embedding_kind=int(kind),
    )
    return Model(
        shape=shape,
        embedding=address(model.embedding),
        layers=layers,
        final_norm=address(model.final_norm),
        cos=address(model.cos),
        sin=address(model.sin),
        head=model.head.struct(),
    )


def address(array: NDArray[np.generic] | None) -> int | None:
    """Of the first value. Raises ValueError."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("the native kernels read contiguous arrays")
    return array.ctypes.data
