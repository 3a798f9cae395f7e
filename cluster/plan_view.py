"""`headrace plan`: how many workers a load needs, as a table or JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig, ConfigError, load_config
from cluster.config_source import parse_setting
from cluster.planner.estimate import SHARES, Estimate
from cluster.planner.profile import Profile, ProfileError, splitwise
from cluster.planner.search import Costs, PoolPlan, search
from cluster.planner.slo import Slo
from cluster.planner.trace import TraceError, read_trace
from cluster.planner.workload import Workload, of_trace

_FAILED = 1
_USAGE = 2

_EPILOG = """\
What a plan can't know: how routing by prefix spreads over workers (hits are counted in one cache), local prefill on
decode workers, what preemption and failures cost, and any load that was not in the trace. `headrace bench serve --slo`
against the running cluster is the judge.
"""


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=160)  # whoever reads it next can cut it
    try:
        profile = _profile(options, err)
        if options.rate is None and options.trace is None:
            out.print_json(profile.to_json())
            return 0
        workload = _workload(options, profile)
        costs = Costs(options.prefill_cost, options.decode_cost, options.unified_cost)
        found = search(
            workload,
            profile,
            options.slo,
            share=options.percentile / 100,
            max_workers=options.max_workers,
            costs=costs,
        )
    except (ProfileError, TraceError, ConfigError, ValueError, OSError) as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return _USAGE
    if options.json:
        out.print_json(json.dumps(as_json(found, workload, profile, options.slo, options.percentile / 100)))
    else:
        out.print(render(found, workload, profile, options.slo, options.percentile / 100))
    return 0 if found.best is not None else _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace plan",
        description="The cheapest numbers of prefill and decode workers (or unified ones) that keep an SLO, queue "
        "wait included, and where one worker fewer falls short. Exit code 1: nothing keeps it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = parser.add_argument_group("the load")
    load.add_argument("--trace", type=Path, help="Mooncake JSONL or Azure CSV")
    load.add_argument("--speedup", type=_positive, default=1.0, help="of the trace")
    load.add_argument(
        "--window", type=_positive, default=300.0, help="plan for the trace's busiest so many seconds"
    )
    load.add_argument(
        "--cache-tokens", type=int, help="that all prefix caches together hold; default: no limit"
    )
    load.add_argument("--rate", type=_positive, help="requests per second")
    load.add_argument("--prompt-tokens", type=int)
    load.add_argument("--output-tokens", type=int)
    load.add_argument(
        "--prefix-hit-rate", type=float, default=0.0, help="share of prompt tokens that are cached"
    )
    load.add_argument(
        "--arrival-cv", type=float, help="deviation of the gaps over their mean; default 1 (Poisson)"
    )
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--slo", type=_slo, default=Slo(1.0, 0.05), help="default ttft=1.0,tpot=0.05 (seconds)"
    )
    asked.add_argument("--percentile", type=float, default=99.0, help="of requests that keep each limit")
    asked.add_argument("--max-workers", type=int, default=64, help="of each pool")
    asked.add_argument("--prefill-cost", type=_positive, default=1.0, help="of one worker, in any unit")
    asked.add_argument("--decode-cost", type=_positive, default=1.0)
    asked.add_argument("--unified-cost", type=_positive, default=1.0)
    worker = parser.add_argument_group("one worker's profile")
    worker.add_argument(
        "--profile", type=Path, help="JSON, e.g. what --measure wrote; or perf_model.csv of splitwise"
    )
    worker.add_argument(
        "--measure", action="store_true", help="run the engine here for a while and keep its profile"
    )
    worker.add_argument("--save-profile", type=Path, help="write the profile that is used here too")
    worker.add_argument("--config", "-c", type=Path, help="settings of the cluster to be measured")
    worker.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    worker.add_argument(
        "--splitwise", metavar="MODEL,HARDWARE,TP", help="row of the CSV, e.g. llama2-70b,h100-80gb,8"
    )
    worker.add_argument(
        "--kv-tokens", type=int, help="that a worker's KV cache holds; with a CSV it must be given"
    )
    worker.add_argument("--kv-bytes-per-token", type=int)
    worker.add_argument("--transfer-bytes-per-s", type=_positive, help="from one prefill worker")
    worker.add_argument("--max-num-seqs", type=int)
    worker.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--json", action="store_true")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _workload(options: argparse.Namespace, profile: Profile) -> Workload:
    cv2 = None if options.arrival_cv is None else options.arrival_cv**2
    if options.trace is not None:
        if options.rate is not None:
            raise ValueError("--trace has its own rate: use --speedup instead of --rate")
        trace = read_trace(options.trace).changed(speedup=options.speedup)
        return of_trace(trace, window_s=options.window, cache_tokens=options.cache_tokens, arrival_cv2=cv2)
    for name in ("prompt_tokens", "output_tokens"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing: --rate needs it")
    made = Workload.uniform(
        options.rate, options.prompt_tokens, options.output_tokens, options.prefix_hit_rate
    )
    return made if cv2 is None else replace(made, arrival_cv2=cv2)


def _profile(options: argparse.Namespace, err: Console) -> Profile:
    given = {
        name: value
        for name in (
            "kv_tokens",
            "kv_bytes_per_token",
            "transfer_bytes_per_s",
            "max_num_seqs",
            "chunk_tokens",
        )
        if (value := getattr(options, name)) is not None
    }
    if options.profile is None:
        profile = replace(_measured(options, err), **given)
    elif options.profile.suffix == ".csv":
        profile = _splitwise(options, given)
    else:
        try:
            text = options.profile.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{options.profile} can't be read: {error}") from error
        profile = replace(Profile.from_json(text, str(options.profile)), **given)
    if options.save_profile is not None:
        options.save_profile.write_text(profile.to_json() + "\n", encoding="utf-8")
    return profile


def _splitwise(options: argparse.Namespace, given: dict[str, Any]) -> Profile:
    try:
        model, hardware, parallel = (options.splitwise or "").split(",")
        wanted = (model, hardware, int(parallel))
    except ValueError:
        raise ProfileError(
            f"--splitwise is {options.splitwise!r}; a CSV needs MODEL,HARDWARE,TP, e.g. llama2-70b,h100-80gb,8"
        ) from None
    if "kv_tokens" not in given:
        raise ProfileError("--kv-tokens is missing: the CSV does not tell how much a worker's KV cache holds")
    return splitwise(options.profile, *wanted, given)


def _measured(options: argparse.Namespace, err: Console) -> Profile:
    """Of the configuration's decode engine: from the cache, unless it is asked for anew."""
    from cluster.profiling import cached_profile, measure
    from cluster.ray_runtime import machine
    from workers.models.catalog import prepare_model
    from workers.models.errors import ModelError

    config = load_config(options.config, dict(parse_setting(text) for text in options.settings))
    engine = config.pool_engine("decode")
    engine = engine.model_copy(
        update={"num_threads": engine.num_threads or _threads(config, machine().hosts[0].cpus)}
    )
    try:
        model = prepare_model(config.model.name, say=lambda text: err.print(text, style="dim", markup=False))
    except ModelError as error:
        raise ProfileError(f"model {config.model.name!r}: {error}") from error
    kept = cached_profile(engine, model)
    if not options.measure:
        if not kept.is_file():
            raise ProfileError(
                f"no worker of {model.served_name} with these settings has been measured here: add --measure, "
                "or give a profile with --profile"
            )
        return Profile.from_json(kept.read_text(encoding="utf-8"), str(kept))
    profile = measure(engine, model, lambda text: err.print(text, style="dim", markup=False))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(profile.to_json() + "\n", encoding="utf-8")
    err.print(f"kept in {kept}", style="dim", markup=False, soft_wrap=True)
    return profile


def _threads(config: ClusterConfig, cores: float) -> int:
    """As each worker of the configuration would get on this machine."""
    return max(1, int(cores) // (config.pools.prefill.replicas + config.pools.decode.replicas))


# --- what was found ---------------------------------------------------------------------------------------------------


def as_json(found: PoolPlan, workload: Workload, profile: Profile, slo: Slo, share: float) -> dict[str, Any]:
    return {
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "share": share},
        "profile": _finite(asdict(profile)),
        "workload": {
            "prefill_rate": workload.prefill_rate,
            "decode_rate": workload.decode_rate,
            "arrival_cv": math.sqrt(workload.arrival_cv2),
            "notes": list(workload.notes),
        },
        "best": _estimate(found.best),
        "split": _estimate(found.split),
        "unified": _estimate(found.unified),
        "smaller": [_estimate(one) for one in found.smaller],
    }


def _estimate(one: Estimate | None) -> dict[str, Any] | None:
    if one is None:
        return None
    made = asdict(one)
    for name in ("ttft_s", "tpot_s"):
        made[name] = {f"p{share * 100:g}": seconds for share, seconds in made[name].items()}
    made["ok"] = one.ok
    return dict(_finite(made))


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(found: PoolPlan, workload: Workload, profile: Profile, slo: Slo, share: float) -> RenderableType:
    head = [Text(f"one worker: {profile.source}", "dim"), *(Text(note, "dim") for note in workload.notes)]
    asked = f"{slo.shown()}, for {share:.4g} of requests"
    if found.best is None:
        head.append(Text(f"nothing that was looked at keeps {asked}", "bold red"))
    else:
        head.append(Text.assemble((found.best.pools.shown(), "bold green"), f"  keeps {asked}"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("workers", no_wrap=True)
    for title in ("TTFT", "TPOT, ms"):
        table.add_column(
            f"{title} {'/'.join(f'p{s * 100:g}' for s in SHARES)}", justify="right", no_wrap=True
        )
    for title in ("prefill busy", "batch/seats", "KV used"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    rows = [found.best, *(e for e in (found.split, found.unified) if e is not found.best), *found.smaller]
    for row in filter(None, rows):
        table.add_row(*_row(row))
    return Group(*head, Text(), table)


def _row(one: Estimate) -> list[str | Text]:
    verdict = Text("keeps the SLO", "green")
    if one.shortfalls:
        verdict = Text("; ".join(f"{s.limit}: {s.text}" for s in one.shortfalls), "yellow")
    return [
        one.pools.shown(),
        " / ".join(_shown(one.ttft_s[share], 1.0, 2) for share in SHARES) + " s",
        " / ".join(_shown(one.tpot_s[share], 1e3, 1) for share in SHARES),
        f"{one.prefill_utilization:.0%}",
        f"{one.decode_batch:.1f}/{one.decode_seats}",
        f"{one.kv_used:.0%}",
        verdict,
    ]


def _shown(seconds: float, scale: float, digits: int) -> str:
    return "∞" if math.isinf(seconds) else f"{seconds * scale:.{digits}f}"
