"""What a benchmark leaves behind: JSON, a Markdown table and, where matplotlib is installed, plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_results(
    out: Path,
    name: str,
    found: dict[str, Any],
    table: str,
    plot: Callable[[dict[str, Any], list[Path]], None],
) -> None:
    """`out`/`name`.json, .md, .svg and .png; the table is printed too. `plot` may raise ImportError."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / f"{name}.md").write_text(table)
    print("\n" + table)
    try:
        plot(found, [out / f"{name}.svg", out / f"{name}.png"])
    except ImportError:
        print("no plot: matplotlib is not installed; pip install -e '.[bench]'")
    print(f"results are in {out}")
