"""One step of a whole decoder as one native call, and the threads that run it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.expert_exchange import ExpertExchange, Hook, check
from kernels.cpu.experts import ExpertTable
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedLayer as PackedLayer
from kernels.cpu.packed import PackedModel as PackedModel
from kernels.cpu.packed import model_struct
from kernels.cpu.structures import KvCache, Step, StepResult

SPIN = 1500  # pauses before a waiting thread sleeps, some 20 us: who else is on the core may have it then

STAGES = ("embed", "qkv", "attention", "output", "gate_up", "down", "experts", "head")


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
        self,
        library: Library,
        pool: ThreadPool,
        model: PackedModel,
        kv: KvCache,
        max_tokens: int,
        expert_slots: int | None = None,
    ) -> None:
        """`max_tokens` bounds the tokens of a step. `expert_slots`: see ExpertTable. Raises MemoryError, ValueError."""
        self.library, self.model, self.max_tokens = library, model, max_tokens
        self._pool, self._kv = pool, kv
        sparse = {index: layer.moe for index, layer in enumerate(model.layers) if layer.moe is not None}
        self.experts = ExpertTable(list(sparse.values()), expert_slots)
        # Its arrays are kept alive by `model` and `experts`.
        self._struct = model_struct(model, dict(zip(sparse, self.experts.structs, strict=True)))
        cdll = library.cdll
        cdll.hr_runtime_new.restype = ctypes.c_void_p
        cdll.hr_runtime_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        cdll.hr_runtime_delete.argtypes = [ctypes.c_void_p]
        cdll.hr_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
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

    def step(
        self,
        step: StepArrays,
        logits: NDArray[np.float32],
        *,
        use_tiles: bool = True,
        exchange: ExpertExchange | None = None,
    ) -> None:
        """Write keys and values of the step's tokens, and the logits of its rows into `logits` [R, >= vocab].

        The GIL is not held meanwhile. `use_tiles`: AMX may be used where the library has it. `exchange`: with the ranks
        that hold the other experts; all of them then make as many steps, of no tokens where they have none. What it
        raises ends the step and is raised here: keys and values are written up to some layer, and the same step can be
        made again. Raises MissingExpert where a token's expert is in no slot.
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
        hook = Hook(exchange)
        given.exchange = hook.struct
        result = StepResult()
        self._run(self._handle, ctypes.byref(given), ctypes.byref(result))
        check(result, hook)

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
