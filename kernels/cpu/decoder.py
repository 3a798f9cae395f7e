"""One step of a whole decoder as one native call, and the threads that run it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.layout import DEPTH, PANEL, round_up
from kernels.cpu.library import Library
from kernels.cpu.structures import (
    EmbeddingKind,
    Format,
    KvCache,
    Layer,
    Matrix,
    Model,
    ModelShape,
    Step,
)

SPIN = 1500  # pauses before a waiting thread sleeps, some 20 us: who else is on the core may have it then

STAGES = ("embed", "qkv", "attention", "output", "gate_up", "down", "head")


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

    def struct(self) -> Matrix:
        return Matrix(
            format=int(self.format),
            n=self.n,
            k=self.k,
            n_pad=self.n_pad,
            k_pad=self.k_pad,
            data=_address(self.data),
            scale=_address(self.scale),
            bias=_address(self.bias),
        )


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """Norm weights are float32. `qkv` has padded heads; `gate_up` alternates 32 gate and 32 up columns: model.h."""

    input_norm: NDArray[np.float32]
    q_norm: NDArray[np.float32] | None
    k_norm: NDArray[np.float32] | None
    mlp_norm: NDArray[np.float32]
    qkv: PackedMatrix
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    window: int | None


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


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step of S sequences with T tokens: contiguous arrays, as struct Step has them."""

    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    slots: NDArray[np.int64]  # [T]
    query_start: NDArray[np.int32]  # [S + 1]
    lengths: NDArray[np.int32]  # [S]
    blocks: NDArray[np.int32]  # block tables one after another
    block_start: NDArray[np.int32]  # [S]
    rows: NDArray[np.int32]  # [R] ascending


class ThreadPool:
    """Threads that steps run on; the calling thread is one of them."""

    def __init__(
        self, library: Library, threads: int, cpus: Sequence[int] | None = None, spin: int = SPIN
    ) -> None:
        """`cpus`: one core for each thread to be pinned to. `spin`: pauses before a wait sleeps."""
        if cpus is not None and len(cpus) != threads:
            raise ValueError(f"{threads} threads cannot be pinned to {len(cpus)} cores {list(cpus)}")
        cdll = library.cdll
        cdll.hr_pool_new.restype = ctypes.c_void_p
        cdll.hr_pool_new.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        cdll.hr_pool_delete.argtypes = [ctypes.c_void_p]
        pinned = None if cpus is None else (ctypes.c_int * threads)(*cpus)
        self.threads = threads
        self.handle: int = cdll.hr_pool_new(threads, pinned, spin)
        self._finalizer = weakref.finalize(self, cdll.hr_pool_delete, self.handle)
        self._finalizer.atexit = False  # a daemon thread may still be within a step when the interpreter ends

    def barrier_ns(self, library: Library, repeats: int = 1000) -> float:
        """Nanoseconds that one meeting of all threads takes."""
        library.cdll.hr_pool_barrier_ns.restype = ctypes.c_double
        library.cdll.hr_pool_barrier_ns.argtypes = [ctypes.c_void_p, ctypes.c_int]
        return float(library.cdll.hr_pool_barrier_ns(self.handle, repeats))


@dataclass(frozen=True, eq=False, slots=True)
class LayerProgress:
    """How far a decoder's steps are, to be asked from any thread while one runs. Keeps the decoder alive.

    Steps are numbered by the calls of `CpuDecoder.step`, the first is 1.
    """

    _decoder: CpuDecoder

    @property
    def steps_begun(self) -> int:
        """The number of the step that runs, or of the last one; 0 before the first."""
        return self._read()[0]

    def layers_done(self, step_number: int) -> int:
        """Layers [0, this) have their keys and values in the cache for all tokens of that step, and whoever was told
        so reads them. 0 for a step to come, all of the layers for one that another has followed."""
        begun, layers = self._read()
        if begun == step_number:
            return layers
        return len(self._decoder.model.layers) if step_number < begun else 0

    def _read(self) -> tuple[int, int]:
        return divmod(self._decoder.progress_word(), len(self._decoder.model.layers) + 1)


class CpuDecoder:
    """A model, its threads and its scratch memory, bound to one KV cache. One call at a time, but for `progress`."""

    def __init__(
        self, library: Library, pool: ThreadPool, model: PackedModel, kv: KvCache, max_tokens: int
    ) -> None:
        """`max_tokens` bounds the tokens of a step. Raises MemoryError."""
        self.library, self.model, self.max_tokens = library, model, max_tokens
        self._pool, self._kv = pool, kv
        self._struct = _struct(model)  # its arrays are kept alive by `model`
        cdll = library.cdll
        cdll.hr_runtime_new.restype = ctypes.c_void_p
        cdll.hr_runtime_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        cdll.hr_runtime_delete.argtypes = [ctypes.c_void_p]
        cdll.hr_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        cdll.hr_step.restype = None
        cdll.hr_progress.argtypes = [ctypes.c_void_p]
        cdll.hr_progress.restype = ctypes.c_int64
        cdll.hr_stage_seconds.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        handle = cdll.hr_runtime_new(ctypes.byref(self._struct), ctypes.byref(kv), pool.handle, max_tokens)
        if not handle:
            raise MemoryError(f"no memory for the scratch space of steps of {max_tokens} tokens")
        self._handle: int = handle
        self._run = cdll.hr_step
        self._finalizer = weakref.finalize(self, cdll.hr_runtime_delete, handle)
        self._finalizer.atexit = False  # as the pool's

    def step(self, step: StepArrays, logits: NDArray[np.float32], *, use_tiles: bool = True) -> None:
        """Write keys and values of the step's tokens, and the logits of its rows into `logits` [R, >= vocab].

        The GIL is not held meanwhile. `use_tiles`: AMX may be used where the library has it.
        """
        tokens, rows = len(step.token_ids), len(step.rows)
        if tokens > self.max_tokens:
            raise ValueError(f"a step of {tokens} tokens; this decoder takes {self.max_tokens} at most")
        given = Step(
            num_tokens=tokens,
            num_sequences=len(step.lengths),
            num_rows=rows,
            use_tiles=use_tiles,
            token_ids=step.token_ids.ctypes.data,
            positions=step.positions.ctypes.data,
            slots=step.slots.ctypes.data,
            query_start=step.query_start.ctypes.data,
            lengths=step.lengths.ctypes.data,
            blocks=step.blocks.ctypes.data,
            block_start=step.block_start.ctypes.data,
            rows=step.rows.ctypes.data,
            logits=logits.ctypes.data,
            logits_stride=logits.shape[1],
        )
        self._run(self._handle, ctypes.byref(given))

    @property
    def progress(self) -> LayerProgress:
        return LayerProgress(self)

    @property
    def steps_begun(self) -> int:
        """Calls of `step` so far, one that runs included: the next is the step `steps_begun + 1` of `progress`."""
        return self.progress.steps_begun

    def progress_word(self) -> int:
        """Steps begun * (layers + 1) + layers written of the last: runtime.h. `progress` is its form for people."""
        return int(self.library.cdll.hr_progress(self._handle))

    def stage_seconds(self) -> dict[str, float]:
        """Wall time spent in each stage since the decoder was made."""
        out = (ctypes.c_double * len(STAGES))()
        self.library.cdll.hr_stage_seconds(self._handle, out)
        return dict(zip(STAGES, out, strict=True))


def _struct(model: PackedModel) -> Model:
    layers = (Layer * len(model.layers))(
        *(
            Layer(
                input_norm=_address(layer.input_norm),
                q_norm=_address(layer.q_norm),
                k_norm=_address(layer.k_norm),
                mlp_norm=_address(layer.mlp_norm),
                qkv=layer.qkv.struct(),
                output=layer.output.struct(),
                gate_up=layer.gate_up.struct(),
                down=layer.down.struct(),
                window=layer.window or 0,
            )
            for layer in model.layers
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
        embedding=_address(model.embedding),
        layers=layers,
        final_norm=_address(model.final_norm),
        cos=_address(model.cos),
        sin=_address(model.sin),
        head=model.head.struct(),
    )


def _address(array: NDArray[np.generic] | None) -> int | None:
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("the native kernels read contiguous arrays")
    return array.ctypes.data
