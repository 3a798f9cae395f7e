"""The native library is compiled on the machine that runs it, once: `python -m kernels.cpu.build`.

One library for each instruction set (a *variant*), all from the same sources, so that a variant is compiled with its
flags throughout and nothing has to be dispatched at run time. A finished library is named by the digest of everything
that went into it (sources, flags, compiler), so that an old one is never taken for a new one. Images carry a prebuilt
folder: `python -m kernels.cpu.build --all --into kernels/cpu/prebuilt`.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "prebuilt"
_STALE_S = 30 * 24 * 3600.0  # libraries of older sources are removed after a month
COMPILERS = ("g++", "c++", "clang++")
# Contraction off: a multiply and an add become one only where the source says fma. Otherwise two instances of one
# template could round differently, and a request's tokens would hang on the batch it runs in.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-semantic-interposition",
    "-fno-gnu-unique",  # two variants in one process, as in tests, must not share a template's statics
    "-Wall",
    "-Wextra",
    # gcc 12 takes the undefined halves in its own AVX-512 headers for our mistakes.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


class BuildError(RuntimeError):
    """The library cannot be built here. The message says why and what to do."""


@dataclass(frozen=True)
class Variant:
    """One instruction set: what the compiler is told, and what /proc/cpuinfo must list to run it."""

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    chosen: bool = True  # whether "auto" may choose it


def _variant(name: str, flags: str, needs: str, chosen: bool = True) -> Variant:
    return Variant(name, tuple(flags.split()), frozenset(needs.split()), chosen)


_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
_BF16 = f"{_AVX512} -mavx512bf16"
_AVX512_NEEDS = "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni"

# Best last.
VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("portable", "", ""),
        _variant("avx2", _AVX2, "avx2 fma f16c"),
        _variant("avx512", _AVX512, _AVX512_NEEDS),
        # AMX's tiles as plain C++, so that what is built on them is tested on machines without them.
        _variant("amx_soft", f"{_BF16} -DHEADRACE_SOFT_TILES", f"{_AVX512_NEEDS} avx512_bf16", chosen=False),
        _variant("avx512_bf16", _BF16, f"{_AVX512_NEEDS} avx512_bf16"),
        _variant(
            "amx",
            f"{_BF16} -mamx-tile -mamx-int8 -mamx-bf16",
            f"{_AVX512_NEEDS} avx512_bf16 amx_tile amx_int8 amx_bf16",
        ),
    )
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this processor can do, in the kernel's words; empty where that is not known (not x86, not Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(
        next((line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), "").split()
    )


def runs_here(variant: Variant) -> bool:
    return variant.needs <= cpu_flags()


def compiles_here(variant: Variant) -> bool:
    return not variant.flags or platform.machine() in ("x86_64", "AMD64")


def best_variant() -> Variant:
    return [variant for variant in VARIANTS.values() if variant.chosen and runs_here(variant)][-1]


def library_path(variant: Variant) -> Path:
    """The built library: a prebuilt one, one from the cache, or one that is compiled now. Raises BuildError."""
    if PREBUILT.is_dir():  # else the sources would be read for nothing at each start
        prebuilt = PREBUILT / _file_name(variant, _digest(variant, _sources(), compiler=""))
        if prebuilt.is_file():
            return prebuilt
    return build(variant, _cache_dir())


def build(variant: Variant, directory: Path, *, portable_name: bool = False) -> Path:
    """Compile into `directory` unless it is there. Safe to call from several processes at a time."""
    sources = _sources()
    compiler = find_compiler()
    try:
        version = "" if portable_name else _version(compiler)
        target = directory / _file_name(variant, _digest(variant, sources, version))
        if target.is_file():
            return target
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f".{variant.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _compile(compiler, variant, sources, target)
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be built in {directory}: {error}") from error
    return target


def find_compiler() -> list[str]:
    """The command: $CXX, which may have arguments ("ccache g++"), or the first of COMPILERS. Raises BuildError."""
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError as error:
        raise BuildError(f"$CXX = {named} is no command: {error}") from error
    for name, *arguments in commands:
        if found := shutil.which(name):
            return [found, *arguments]
    looked_for = f"$CXX = {named}" if named else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler found (looked for {looked_for}); on Debian: apt-get install g++")


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def _digest(variant: Variant, sources: Sequence[Path], compiler: str) -> str:
    digest = hashlib.sha256("\0".join((platform.machine(), compiler, *FLAGS, *variant.flags)).encode())
    for source in sources:
        content = source.read_bytes()
        digest.update(f"{source.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _file_name(variant: Variant, digest: str) -> str:
    return f"libheadrace_cpu-{variant.name}-{digest}.so"


def _cache_dir() -> Path:
    """As workers.models.cache has it, which this folder must not import."""
    if own := os.environ.get("HEADRACE_CACHE"):
        return Path(own).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "headrace" / "kernels"


def _version(compiler: Sequence[str]) -> str:
    """With what the command says besides: it may be flags."""
    shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return " ".join((shown.stdout.splitlines()[0] if shown.stdout else compiler[0], *compiler[1:]))


def _compile(compiler: Sequence[str], variant: Variant, sources: Sequence[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{variant.name}-") as directory:
        units = [source for source in sources if source.suffix == ".cpp"]
        objects = [Path(directory) / f"{unit.stem}.o" for unit in units]

        def one(unit: Path, into: Path) -> None:
            _run([*compiler, *FLAGS, *variant.flags, "-c", str(unit), "-o", str(into)])

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(one, units, objects))
        linked = Path(directory) / target.name
        _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        linked.rename(target)
    for old in target.parent.glob("libheadrace_cpu-*.so"):
        if time.time() - old.stat().st_mtime > _STALE_S:
            old.unlink(missing_ok=True)  # a process that has it mapped keeps it


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = "\n".join(done.stderr.splitlines()[:20])
        raise BuildError(f"compiling the CPU kernels failed: {' '.join(command)}\n{first}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--all", action="store_true", help="every variant, not only the best of this machine")
    parser.add_argument("--into", type=Path, help="a folder to put them in, instead of the cache")
    arguments = parser.parse_args()
    wanted = [v for v in VARIANTS.values() if v.chosen] if arguments.all else [best_variant()]
    try:
        for variant in filter(compiles_here, wanted):
            built = (
                build(variant, arguments.into, portable_name=True)
                if arguments.into
                else library_path(variant)
            )
            print(f"CPU kernels ({variant.name}): {built}")  # noqa: T201
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
