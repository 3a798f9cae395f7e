"""Compiling Triton's kernels for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that one program may have, by compute capability.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


def build(
    kernel: Any,
    architecture: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    aligned: Iterable[str] = (),
    **options: Any,
) -> str:
    """The PTX of `kernel` for compute capability `architecture` / 10. Asserts that its shared memory fits.

    aligned: arguments that are multiples of 16, of which Triton takes note when it is called.
    """
    signature = arguments | dict.fromkeys(constants, "constexpr")
    sixteen = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=sixteen)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert built.metadata.shared <= SHARED[architecture]
    return str(built.asm["ptx"])
