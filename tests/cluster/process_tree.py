"""Processes that this one started, and those that these started, as Linux' /proc knows them."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(root: int | None = None) -> list[int]:
    """Process ids below `root` (this process), parents first. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # The name in parentheses may hold spaces; the fields after it are: state, parent id, ...
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    below = [root if root is not None else os.getpid()]
    while below:
        mine = children.get(below.pop(0), [])
        found += mine
        below += mine
    return found
