"""Figures of one benchmark as they are found: a file that is whole after every row, so that an end by a time limit loses
only what had not been measured."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Rows:
    def __init__(self, path: Path | None, seconds: float = float("inf")) -> None:
        """`path`: the file; None: standard output at the end. `seconds`: no part is begun after that."""
        self._path = path
        self._until = time.monotonic() + seconds
        self.found: dict[str, Any] = {"rows": [], "left_out": []}

    def note(self, **facts: Any) -> None:
        """What holds for all rows."""
        self.found |= facts
        self._write()

    def add(self, **row: Any) -> None:
        self.found["rows"].append(row)
        self._write()

    @contextmanager
    def part(self, name: str) -> Iterator[bool]:
        """Whether there is time for it. What it raises becomes a row, and the next part has its turn."""
        if time.monotonic() > self._until:
            self.found["left_out"].append(name)
            self._write()
            yield False
            return
        try:
            yield True
        except Exception as error:  # noqa: BLE001  # one part that fails must not take the others with it
            self.add(case=name, failed=f"{type(error).__name__}: {error}"[:500])

    def end(self) -> None:
        if self._path is None:
            print(json.dumps(self.found, indent=1))
        else:
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, self.found)


def write_json(path: Path, found: dict[str, Any]) -> None:
    """In one go: whoever reads the file finds it whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    given = argparse.ArgumentParser(
        prog=f"python -m {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given.add_argument("--model", type=Path, help="a directory that bench.gpu.model has written; else one is")
    given.add_argument("--json", type=Path, help="file for the figures; else they are printed at the end")
    given.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: to try the program")
    given.add_argument("--seconds", type=float, default=float("inf"), help="no part is begun after that")
    return given
