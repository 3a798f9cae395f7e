"""What was set out to be reached on one GPU, beside what one run of bench/gpu_check.sh found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: str
    found: float | None  # None: not measured
    met: bool | None

    @staticmethod
    def of(what: str, found: float | None, bound: float, *, at_most: bool, form: str) -> Goal:
        met = None if found is None else found <= bound if at_most else found >= bound
        return Goal(what, ("at most " if at_most else "at least ") + form.format(bound), found, met)


def goals(found: Found) -> list[Goal]:
    """Of the collected report, see bench.gpu.report."""
    return [
        *_decode(found),
        *_cpu(found),
        *_prefill(found),
        *_attention(found),
        *_throughput(found),
        *_growth(found),
    ]


def _rows(found: Found, bench: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = found["benches"].get(bench, {}).get("rows", [])
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _one(found: Found, bench: str, figure: str, **wanted: Any) -> float | None:
    return next((row[figure] for row in _rows(found, bench, **wanted) if row.get(figure) is not None), None)


def _decode(found: Found) -> Iterator[Goal]:
    for bench, name in (("engine", "bf16"), ("engine_fp8", "fp8")):
        for batch in (1, 16, 64, 256):
            times = _one(found, bench, "times_floor", case="decode step", batch=batch)
            what = f"decode step, {name}, batch {batch}: times the reading of weights and KV"
            yield Goal.of(what, times, 1.25, at_most=True, form="{:.2f}")


def _cpu(found: Found) -> Iterator[Goal]:
    cpu_ms = _one(found, "engine", "cpu_ms", case="decode step", batch=64)
    yield Goal.of("CPU time of a step at batch 64, ms", cpu_ms, 0.3, at_most=True, form="{:.1f}")


def _prefill(found: Found) -> Iterator[Goal]:
    share = _one(found, "engine", "share_of_matmul", case="prefill")
    yield Goal.of(
        "prefill of 8,192 tokens: share of the matmul rate", share, 0.6, at_most=False, form="{:.1f}"
    )


def _attention(found: Found) -> Iterator[Goal]:
    shares = [
        case["forms"]["headrace"].get("share")
        for case in found["benches"].get("kernels", {}).get("cases", [])
        if case["name"] == "decode attention"
        and (case["shape"].get("sequences"), case["shape"].get("context")) == (64, 4096)
        and case["shape"].get("cache") == "bfloat16"
    ]
    what = "decode attention, batch 64, context 4,096: share of the copy bandwidth"
    yield Goal.of(what, next(iter(shares), None), 0.8, at_most=False, form="{:.1f}")


def _throughput(found: Found) -> Iterator[Goal]:
    ours = _one(found, "engine", "tokens_per_s", case="throughput")
    for part, times in (("continuous", 3.0), ("static", 10.0)):
        theirs = _one(found, "peers", "tokens_per_s", case=f"transformers, {part}")
        ratio = ours / theirs if ours and theirs else None
        yield Goal.of(
            f"output tokens/s: times transformers' {part} batching",
            ratio,
            times,
            at_most=False,
            form="{:.0f}",
        )


def _growth(found: Found) -> Iterator[Goal]:
    held = [
        row["reserved_bytes"] for row in _rows(found, "endurance", case="growth") if "reserved_bytes" in row
    ]
    grown = (held[-1] - held[0]) / 2**20 if len(held) > 1 else None
    yield Goal.of(
        "GPU memory grown from 1,000 to 10,000 requests, MiB", grown, 0.0, at_most=True, form="{:.0f}"
    )


def table(found: Found) -> list[str]:
    """Markdown."""
    lines = ["| goal | wanted | found | met |", "|---|---|---|---|"]
    for goal in goals(found):
        figure = "not measured" if goal.found is None else f"{goal.found:.3g}"
        met = {None: "", True: "yes", False: "no"}[goal.met]
        lines.append(f"| {goal.what} | {goal.wanted} | {figure} | {met} |")
    return lines
