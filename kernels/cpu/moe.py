"""Experts outside of a decoder's step: routing alone, one layer alone. For tests and benchmarks."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.decoder import ThreadPool
from kernels.cpu.expert_exchange import ExpertExchange, Hook, check
from kernels.cpu.experts import ExpertTable, routing_struct
from kernels.cpu.library import Library
from kernels.cpu.packed import PackedMoe, address
from kernels.cpu.structures import StepResult

if TYPE_CHECKING:
    from kernels.reference_moe import Routing


def route(
    library: Library,
    logits: NDArray[np.float32],
    routing: Routing,
    correction_bias: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """logits [T, E] -> weights float32 [T, k], experts int32 [T, k], as kernels.reference_moe.route."""
    rows, experts = logits.shape
    struct = routing_struct(routing, experts)
    logits = np.ascontiguousarray(logits, np.float32)
    weights = np.empty((rows, routing.top_k), np.float32)
    chosen = np.empty((rows, routing.top_k), np.int32)
    function = library.cdll.hr_moe_route
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_int, pointer, pointer, pointer, pointer]
    function.restype = None
    function(
        address(logits),
        rows,
        ctypes.byref(struct),
        address(correction_bias),
        address(weights),
        address(chosen),
    )
    return weights, chosen


class MoeBlock:
    """One layer with experts, its threads and scratch memory. One call at a time."""

    def __init__(
        self, library: Library, pool: ThreadPool, moe: PackedMoe, max_tokens: int, slots: int | None = None
    ) -> None:
        """`slots`: see ExpertTable. Raises MemoryError, ValueError."""
        self.experts = ExpertTable([moe], slots)
        self.hidden, self.max_tokens = moe.router.k, max_tokens
        self._pool, self._moe = pool, moe  # kept alive
        cdll = library.cdll
        cdll.hr_moe_new.restype = ctypes.c_void_p
        cdll.hr_moe_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        cdll.hr_moe_delete.argtypes = [ctypes.c_void_p]
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._run = cdll.hr_moe_run
        self._run.argtypes = [pointer, pointer, number, number, pointer, number, pointer, pointer]
        self._run.restype = None
        handle = cdll.hr_moe_new(ctypes.byref(self.experts.structs[0]), pool.handle, max_tokens)
        if not handle:
            raise MemoryError(f"no memory for the scratch space of {max_tokens} tokens")
        self._handle: int = handle
        self._finalizer = weakref.finalize(self, cdll.hr_moe_delete, handle)
        self._finalizer.atexit = False  # as the pool's

    def add(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        use_tiles: bool = True,
        exchange: ExpertExchange | None = None,
    ) -> None:
        """out [T, hidden] += the layer of x [T, hidden]. `exchange`: see CpuDecoder.step."""
        if x.shape != out.shape or x.shape[1] != self.hidden or len(x) > self.max_tokens:
            raise ValueError(
                f"x {x.shape} and out {out.shape}: both must be [at most {self.max_tokens}, {self.hidden}]"
            )
        hook, result = Hook(exchange), StepResult()
        given = (self._handle, address(x), len(x), self.hidden, address(out), int(use_tiles))
        self._run(*given, ctypes.byref(hook.struct), ctypes.byref(result))
        check(result, hook)

    def __call__(self, x: NDArray[np.float32], *, use_tiles: bool = True) -> NDArray[np.float32]:
        """The layer of x [T, hidden]: [T, hidden]."""
        out = np.zeros_like(x)
        self.add(x, out, use_tiles=use_tiles)
        return out
