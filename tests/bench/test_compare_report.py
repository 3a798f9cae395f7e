"""Tables: the best first, a reason where there are no figures, errors shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.compare.campaign import Record
from bench.compare.report import markdown
from bench.compare.systems import DEFAULT, KNOWN, Place, launch
from bench.configurations import NotSupported, check_in_force, engine_config, overrides
from bench.machine import describe
from bench.workloads import WORKLOADS


def figures(rate: float, errors: float = 0) -> dict[str, float]:
    names = {name for workload in WORKLOADS.values() for name in workload.columns}
    return dict.fromkeys(names, 0.01) | {"output_tokens_per_s": rate, "errors": errors, "requests": 4.0}


def document(*records: Record) -> dict[str, Any]:
    return {
        "machine": describe(),
        "runs": 3,
        "quick": False,
        "workloads": {"one": WORKLOADS["one"].what},
        "systems": [asdict(record) for record in records],
    }


def test_the_best_comes_first_and_what_failed_last_with_its_reason() -> None:
    slow = Record("slow", "1", "run slow", figures={"one": [figures(10), figures(30), figures(20)]})
    fast = Record("fast", "2", "run fast", figures={"one": [figures(99.0, errors=1)]})
    gone = Record("gone", trouble=["no wheel | here"])
    rows = [line for line in markdown(document(slow, gone, fast)).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| system", "| fast", "| slow", "| gone"]
    assert "| 20 (10–30) |" in rows[2]
    assert rows[1].endswith("| 1 of 4 |")
    assert "no wheel / here" in rows[3]
    assert len({row.count("|") for row in rows}) == 1


def test_the_start_command_of_each_is_shown() -> None:
    text = markdown(document(Record("a", "1.2", "serve --fast", figures={"one": [figures(1)]})))
    assert "- `a` (1.2): `serve --fast`" in text


def test_a_quick_run_says_so_first() -> None:
    quick = document(Record("a", figures={"one": [figures(1)]})) | {"quick": True}
    assert markdown(quick).startswith("A quick run")
    assert "A quick run" not in markdown(quick | {"quick": False})


def test_the_default_systems_are_known() -> None:
    assert {name.partition(":")[0] for name in DEFAULT} == set(KNOWN)


def test_an_unknown_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'llamas' is not known; known are headrace"):
        launch("llamas", Place(tmp_path, None, 1, 2))  # type: ignore[arg-type]


def test_configurations_are_settings_of_the_engine() -> None:
    assert engine_config("fp32+nocache").dtype == "float32"
    assert engine_config("fp32+nocache", num_threads=2).prefix_caching is False
    with pytest.raises(ValueError, match=r"'int3' is not known: .*int8"):
        overrides("int3")


def test_an_engine_that_did_not_heed_its_settings_is_not_measured() -> None:
    class Deaf:
        class runner:
            kernels = "torch"

    with pytest.raises(NotSupported, match="int8"):
        check_in_force("int8", Deaf())
