"""Compilers that are there, are not, and fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cpu import build
from kernels.cpu.build import VARIANTS, BuildError, find_compiler, library_path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")


def _compiler(path: Path, script: str) -> str:
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def test_the_compiler_of_the_environment_may_have_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = _compiler(tmp_path / "wrap", '#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("CXX", f"{wrapper} g++ '-DNAME=a b'")
    assert find_compiler() == [wrapper, "g++", "-DNAME=a b"]


@pytest.mark.parametrize("named", ["no-such-compiler", "no-such-compiler -O1", "'g++"])
def test_a_compiler_that_is_not_there(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match="CXX = "):
        find_compiler()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\necho no space >&2\nexit 1\n", "compiling the CPU kernels failed.*\nno space"),
        ("#!/no/such/interpreter\n", "cannot be built in"),
        ("not a program", "cannot be built in"),
    ],
)
def test_a_compiler_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    monkeypatch.setenv("CXX", _compiler(tmp_path / "compiler", script))
    with pytest.raises(BuildError, match=says):
        library_path(VARIANTS["portable"])
    assert not list((tmp_path / "cache").glob("kernels/*.so"))


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", _compiler(tmp_path / "compiler", "#!/bin/sh\n"))
    (tmp_path / "cache").write_text("")
    with pytest.raises(BuildError, match="cannot be built in"):
        library_path(VARIANTS["portable"])
