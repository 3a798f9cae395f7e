"""The native library of this machine, loaded through ctypes (which gives up the GIL during every call)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from kernels.cpu.build import VARIANTS, BuildError, best_variant, library_path, runs_here


@dataclass(frozen=True, eq=False)
class Library:
    """`cdll` has the functions; each wrapper beside this file declares those that it calls."""

    cdll: ctypes.CDLL
    variant: str


@functools.cache
def load(variant: str = "auto") -> Library:
    """Build if need be and load. Raises BuildError: no compiler, or a variant that this processor cannot run."""
    if variant == "auto":
        best = best_variant()
        library = _open(best.name)
        if best.name == "amx" and not library.cdll.hr_amx_enable():
            # The kernel must grant the tile registers (Linux 5.16, not switched off by the hypervisor).
            return _open("avx512_bf16")
        return library
    known = VARIANTS.get(variant)
    if known is None:
        raise BuildError(f"CPU kernels {variant!r} are not known; known are auto, {', '.join(VARIANTS)}")
    if not runs_here(known):
        raise BuildError(f"CPU kernels {variant!r} do not run on this processor; {best_variant().name} does")
    library = _open(variant)
    if variant == "amx" and not library.cdll.hr_amx_enable():
        raise BuildError("the operating system does not grant AMX tiles; use avx512_bf16")
    return library


def _open(variant: str) -> Library:
    path = library_path(VARIANTS[variant])
    try:
        return Library(ctypes.CDLL(str(path)), variant)
    except OSError as error:  # damaged, or in a folder from which nothing may be executed
        raise BuildError(
            f"the CPU kernels cannot be loaded ({error}); remove {path} and start again"
        ) from error
