"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager2"}
SOURCES = {
    ".py",
    ".md",
    ".yaml",
    ".yml",
    ".toml",
    ".lua",
    ".proto",
    ".cpp",
    ".hpp",
    ".h",
    ".sh",
    ".json",
    ".txt",
    "",
}
# Absolute paths that only one machine has, and the hosts of package indexes.
MACHINE_TRACES = (
    re.compile(r"(?<![\w.])/(?:home|Users)/\w+"),
    re.compile(r"(?<![\w.])/(?:root|work)/"),
    re.compile(r"https?://[^\s\"']*(?:pypi|/simple\b|artifactory|nexus)[^\s\"']*"),
)


def tracked_files() -> list[Path]:
    """What is or could be committed; all files where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_names_say_what_is_inside() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in tracked_files() if path.stem.lower() in FORBIDDEN_NAMES]
    assert not wrong, f"these names say nothing: {', '.join(wrong)}"


def test_no_trace_of_one_machine() -> None:
    wrong = []
    for path in tracked_files():
        if path.suffix not in SOURCES or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if any(pattern.search(line) for pattern in MACHINE_TRACES):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip():.100}")
    assert not wrong, "\n".join(wrong)


def vacuous(node: ast.Assert) -> bool:
    """`assert True`, and `assert (x, "message")`, which is a tuple and so always true."""
    return isinstance(node.test, ast.Tuple) or (isinstance(node.test, ast.Constant) and bool(node.test.value))


def test_no_assertion_is_vacuous() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and vacuous(node)
    ]
    assert not wrong, ", ".join(wrong)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("assert True", True), ("assert (x, 'why')", True), ("assert x, 'why'", False), ("assert False", False)],
)
def test_vacuous_assertions_are_recognised(source: str, expected: bool) -> None:
    statement = ast.parse(source).body[0]
    assert isinstance(statement, ast.Assert)
    assert vacuous(statement) is expected
