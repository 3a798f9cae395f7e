"""What the steps of bench/gpu_check.sh left behind, as one JSON file and one Markdown file.

python -m bench.gpu.report RAW OUT     exits with 1 when a test failed or a benchmark broke
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from bench.gpu import goals
from bench.gpu.__main__ import describe
from bench.machine import describe as describe_machine

_MISSING = re.compile(r"No module named '([\w.]+)'")


def collect(raw: Path) -> dict[str, Any]:
    """{"machine", "gpu", "tests": {name: ...}, "benches": {name: ...}} of a directory that gpu_check.sh filled, in its
    order."""
    found: dict[str, Any] = {"machine": describe_machine(), "gpu": _gpu(), "tests": {}, "benches": {}}
    for status in sorted(raw.glob("*.status"), key=lambda path: (path.stat().st_mtime_ns, path)):
        kind, name = status.stem.split(".", 1)
        code, _, seconds = status.read_text().strip().rpartition(" ")
        ended = {"0": "ran", "124": "ran out of time", "137": "ran out of time"}.get(code, code)
        step: dict[str, Any] = {"ended": ended, "seconds": int(seconds)}
        if kind == "tests":
            found["tests"][name] = step | _tests(raw, name, ended)
        else:
            found["benches"][name] = step | _bench(raw, name)
            if ended not in ("ran", "ran out of time") and not ended.startswith("not begun"):
                found["benches"][name].setdefault("note", _last_line(raw / f"bench.{name}.err"))
    return found


def failed(found: dict[str, Any]) -> bool:
    if any(test["failed"] for test in found["tests"].values()):
        return True
    benches = found["benches"].values()
    forms = [form for bench in benches for case in bench.get("cases", []) for form in case["forms"].values()]
    return any(
        "failed" in one for one in [*forms, *(row for bench in benches for row in bench.get("rows", []))]
    )


def markdown(found: dict[str, Any]) -> str:
    gpu = found["gpu"]
    lines = [
        f"# {gpu.get('name') or 'No GPU'}, {gpu.get('date', 'no date')}",
        "",
        f"torch {gpu.get('torch')}, CUDA {gpu.get('cuda')}, triton {gpu.get('triton')}, "
        f"commit {found['machine']['commit']}",
        "",
        *goals.table(found),
        "",
        "| tests | passed | failed | skipped | seconds | |",
        "|---|---|---|---|---|---|",
    ]
    for name, test in found["tests"].items():
        counts = " | ".join(str(len(test[kind])) for kind in ("passed", "failed", "skipped"))
        reasons = sorted(set(test["skipped"].values()) | set(test["failed"].values()))
        note = "; ".join([test["note"]] * bool(test["note"]) + reasons[:3])
        lines.append(f"| {name} | {counts} | {test['seconds']} | {_cell(note)} |")
    for name, bench in found["benches"].items():
        lines += ["", f"## {name}", ""]
        if bench.get("rows"):
            lines += [_facts(bench), "", *_rows(bench["rows"])]
        elif "cases" in bench:
            lines += [*_ceilings(bench["ceilings"]), "", *_cases(bench["cases"])]
        else:
            lines.append(_without_figures(bench))
        lines += ["", *(f"Left out for want of time: {what}" for what in bench.get("left_out", []))]
        if bench["ended"] == "ran out of time":
            lines.append(f"Ended by its time limit after {bench['seconds']} s; what it had found is above.")
        elif bench.get("rows") and "note" in bench:
            lines.append(f"Ended with {bench['ended']}: {bench['note']}")
    return "\n".join(lines) + "\n"


def _cases(cases: list[dict[str, Any]]) -> list[str]:
    lines = ["| case | form | µs | GB/s | TFLOP/s | share of ceiling |", "|---|---|---|---|---|---|"]
    for case in cases:
        shape = ", ".join(f"{key} {value}" for key, value in case["shape"].items())
        for form, figures in case["forms"].items():
            lines.append(f"| {case['name']}: {shape} | {form} | {_figures(figures, case['ceiling'])} |")
    return lines


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    """A column for each figure that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    heads = (_label(name) for name in columns)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(_value(name, row.get(name)) for name in columns) + " |" for row in rows]


def _label(name: str) -> str:
    return name.replace("_bytes", ", GiB").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.2f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return _cell(f"{value:,}" if isinstance(value, int) else str(value))


def _facts(bench: dict[str, Any]) -> str:
    """What holds for all its rows."""
    apart = ("rows", "left_out", "ended", "seconds", "ceilings", "note")
    facts = [
        f"{key.replace('_', ' ')}: {_value(key, value)}" for key, value in bench.items() if key not in apart
    ]
    ceilings = _ceilings(bench["ceilings"]) if "ceilings" in bench else []
    return " ".join([*ceilings, "; ".join(facts)]).strip()


def _without_figures(bench: dict[str, Any]) -> str:
    if bench["ended"].startswith("not begun"):
        return str(bench["ended"])
    if "skipped" in bench:
        return str(bench["skipped"])
    if "note" in bench:
        return f"Ended with {bench['ended']}: {bench['note']}"
    return "Its figures are in the JSON file."


def _tests(raw: Path, name: str, ended: str) -> dict[str, Any]:
    """By test: how it ended, with the reason of what was skipped or failed."""
    kinds: dict[str, Any] = {"passed": [], "failed": {}, "skipped": {}, "note": ""}
    report = raw / f"tests.{name}.xml"
    if not report.exists():
        if ended.startswith("not begun"):
            kinds["note"] = ended
        else:
            last = _last_line(raw / f"tests.{name}.err") or _last_line(raw / f"tests.{name}.out")
            kinds["failed"][name] = f"no report, ended with {ended}: {last}"
        return kinds
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        skipped, wrong = case.find("skipped"), case.find("failure")
        broken = case.find("error")
        if skipped is not None:
            kinds["skipped"][test] = skipped.get("message", "")
        elif broken is not None and (missing := _MISSING.search(broken.text or "")):
            kinds["skipped"][test] = f"{missing[1]} is not installed"
        elif wrong is not None or broken is not None:
            element = wrong if wrong is not None else broken
            assert element is not None
            kinds["failed"][test] = (element.get("message") or "")[:500]
        else:
            kinds["passed"].append(test)
    return kinds


def _bench(raw: Path, name: str) -> dict[str, Any]:
    for report in (raw / f"bench.{name}.json", raw / f"bench.{name}.out"):
        try:
            found = json.loads(report.read_text())
        except (OSError, ValueError):
            continue
        return found if isinstance(found, dict) else {"lines": found}
    return {"note": _last_line(raw / f"bench.{name}.err")}


def _gpu() -> dict[str, Any]:
    try:
        return describe()
    except ImportError as error:
        return {"lack": f"{error.name} is not installed"}


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:300] if lines else ""


def _ceilings(ceilings: dict[str, float | None]) -> list[str]:
    copy, matmul = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"]
    if copy is None or matmul is None:
        return ["A rehearsal: nothing was timed."]
    return [f"Ceilings, same run: copy {copy / 1e9:,.0f} GB/s, bf16 matmul {matmul / 1e12:,.0f} TFLOP/s."]


def _figures(form: dict[str, Any], ceiling: str) -> str:
    if "failed" in form:
        return f"{_cell(form['failed'])} | | |"
    if form["seconds"] is None:
        return "not timed | | |"
    rate, flops = f"{form['bytes_per_s'] / 1e9:,.0f}", form.get("flops_per_s")
    computed = f"{flops / 1e12:,.1f}" if flops else ""
    share = f"{form['share']:.0%} of {ceiling}" if "share" in form else ""
    return f"{form['seconds'] * 1e6:,.1f} | {rate} | {computed} | {share}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def main() -> None:
    raw, out = map(Path, sys.argv[1:3])
    found = collect(raw)
    text = markdown(found)
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu.md").write_text(text)
    print(text)
    sys.exit(failed(found))


if __name__ == "__main__":
    main()
