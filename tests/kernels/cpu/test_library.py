"""What cannot be loaded is said as what cannot be built is: torch may take its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cpu import library
from kernels.cpu.build import BuildError


def test_a_damaged_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "libheadrace_cpu.so"
    damaged.write_bytes(b"\x7fELF, once")
    monkeypatch.setattr(library, "library_path", lambda variant: damaged)
    with pytest.raises(BuildError, match=f"cannot be loaded .*remove {damaged}"):
        library.load.__wrapped__("portable")
