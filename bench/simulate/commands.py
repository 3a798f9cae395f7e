"""The command line of the simulator."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import write_results
from bench.simulate.capacity import capacity_per_s
from bench.simulate.cluster import Cluster, ClusterConfig, Fault
from bench.simulate.comparison import markdown, plot
from bench.simulate.cost import CostError, StepCost
from bench.simulate.defaults import H100_LLAMA2_70B, KV_TOKENS
from bench.simulate.experiment import Cell, Row, run_cells
from bench.simulate.index_stream import StreamConfig
from bench.simulate.jobs import Asked
from bench.simulate.network import Wires
from bench.simulate.outcome import Slo, measured, summary
from bench.simulate.perf_table import read_table
from bench.simulate.policies import NAMES
from bench.simulate.traces import (
    MOONCAKE_BLOCK,
    SessionsShape,
    TraceError,
    rate_per_s,
    read_azure,
    read_mooncake,
    sessions,
)
from bench.simulate.worker import Limits
from router.config import RouterConfig

SESSION_BLOCK = 64  # tokens


class UsageError(ValueError):
    """The message says which option, what came and what is allowed."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.simulate",
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one trace, one policy, one load")
    _add_trace(run)
    _add_cluster(run)
    run.add_argument("--policy", default="cost", help=f"one of {', '.join(NAMES)}; default cost")
    given_load = run.add_mutually_exclusive_group()
    given_load.add_argument("--load", type=float, help="share of the capacity, which is measured first")
    given_load.add_argument("--rate", type=float, help="requests a second; neither: as in the trace")
    run.add_argument("--json", type=Path, help="write what was found there")
    run.add_argument("--timings", action="store_true", help="also what depends on this machine")
    run.set_defaults(act=_run)
    policies = commands.add_parser("policies", help="every policy, several loads, sizes and traces: a table")
    _add_trace(policies)
    _add_cluster(policies)
    policies.add_argument("--policies", type=_words, default=list(NAMES), help=f"of {','.join(NAMES)}")
    policies.add_argument("--loads", type=_shares, default=[0.2, 0.5, 0.7, 0.85, 0.95])
    policies.add_argument("--sizes", type=_counts, default=[8, 16, 64], help="workers")
    policies.add_argument("--shapes", type=_words, default=["split", "unified"])
    policies.add_argument("--and-sessions", action="store_true", help="sessions too, beside --trace")
    policies.add_argument(
        "--per-worker", type=int, default=250, help="requests for each worker, as far as the trace goes"
    )
    policies.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="as many stretches of the trace, other sessions; medians are shown",
    )
    policies.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    policies.add_argument("--out", type=Path, default=Path("bench-out/simulate"))
    policies.set_defaults(act=_policies)
    together = commands.add_parser("together", help="one table and plot of several runs of `policies`")
    together.add_argument("results", type=Path, nargs="+", help="their policies.json; of runs cut short, too")
    together.add_argument("--out", type=Path, default=Path("bench-out/simulate"))
    together.set_defaults(act=_together)
    fitting = commands.add_parser(
        "fit", help="a cost model of the engine on this machine, and how good it is"
    )
    fitting.add_argument("--model", default="smollm2-135m-instruct")
    fitting.add_argument("--config", default="bf16", help="as `bench engine` names them")
    fitting.add_argument("--threads", type=int, default=1)
    fitting.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, a busy machine"
    )
    fitting.add_argument("--chunk", type=int, default=256, help="engine.max_num_batched_tokens")
    fitting.add_argument("--runs", type=int, default=3)
    fitting.add_argument("--out", type=Path, default=Path("cost.json"), help="for `run --cost`")
    fitting.add_argument("--json", type=Path, help="every step and every check")
    fitting.set_defaults(act=_fit)
    given = parser.parse_args(arguments)
    try:
        given.act(given)
    except (UsageError, TraceError, CostError, ValueError) as error:
        parser.error(str(error))


def _words(text: str) -> list[str]:
    return text.split(",")


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _add_trace(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, help="Mooncake JSONL, or Azure CSV (by its ending)")
    source.add_argument("--sessions", type=int, help="so many made-up multi-turn sessions; default 1500")
    parser.add_argument("--requests", type=int, help="only the first so many of the trace")
    parser.add_argument(
        "--think-s", type=float, default=SessionsShape.think_s, help="mean pause inside a session"
    )
    parser.add_argument("--zipf", type=float, default=1.0, help="how unequal system prompts are")
    parser.add_argument(
        "--block-size",
        type=int,
        help=f"tokens; default {MOONCAKE_BLOCK} for traces, {SESSION_BLOCK} for sessions",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=8, help="unified workers")
    parser.add_argument("--prefill", type=int, help="prefill workers; with --decode, instead of --workers")
    parser.add_argument("--decode", type=int, help="decode workers")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--cost", type=Path, help="cost model as `fit` writes it")
    parser.add_argument("--table", type=Path, help="cost model out of Splitwise's perf_model.csv")
    parser.add_argument(
        "--hardware", default="llama2-70b/h100-80gb/8", help="of the table: model/hardware/TP"
    )
    parser.add_argument("--kv-tokens", type=int, default=KV_TOKENS, help="KV cache of a worker")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens in one step")
    parser.add_argument("--gbit", type=float, default=200.0, help="between nodes")
    parser.add_argument("--no-fetch", action="store_true", help="no worker fetches a prefix from another")
    parser.add_argument("--index-delay-s", type=float, default=0.002)
    parser.add_argument("--index-loss", type=float, default=0.0, help="share of index batches that are lost")
    parser.add_argument(
        "--fault", action="append", default=[], help="death,AT_S,FOR_S,WORKER or away,AT_S,FOR_S; repeatable"
    )
    parser.add_argument("--max-queue", type=int, default=10**9, help="admission.max_queue; default: no bound")
    parser.add_argument("--queue-timeout-s", type=float, default=1e9, help="default: no bound")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="policy weights")
    parser.add_argument("--slo-ttft-s", type=float, default=5.0)
    parser.add_argument("--slo-tpot-s", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)


def trace_of(given: argparse.Namespace) -> tuple[list[Asked], int]:
    """The trace and its block size."""
    if given.trace is None:
        size = given.block_size or SESSION_BLOCK
        shape = SessionsShape(
            sessions=given.sessions or SessionsShape.sessions,
            think_s=given.think_s,
            zipf=given.zipf,
            seed=given.seed,
        )
        trace = sessions(shape, size)
        return trace[: given.requests], size
    size = given.block_size or MOONCAKE_BLOCK
    read = read_azure if given.trace.suffix == ".csv" else read_mooncake
    trace = read(given.trace, size, given.requests)
    if not trace:
        raise UsageError(f"--trace {given.trace}: there is no request in it")
    return trace, size


def cost_of(given: argparse.Namespace) -> StepCost:
    if given.cost is not None and given.table is not None:
        raise UsageError("--cost and --table: give one of them")
    if given.cost is not None:
        return StepCost.read(given.cost)
    if given.table is None:
        return H100_LLAMA2_70B
    parts = given.hardware.split("/")
    if len(parts) != 3 or not parts[2].isdigit():
        raise UsageError(f"--hardware {given.hardware}: it must be model/hardware/tensor parallel")
    return read_table(given.table, parts[0], parts[1], int(parts[2]))


def config_of(given: argparse.Namespace, policy: str, block_size: int) -> ClusterConfig:
    prefill, decode = 0, given.workers
    if given.prefill is not None or given.decode is not None:
        if given.decode is None:
            raise UsageError("--prefill needs --decode")
        prefill, decode = given.prefill or 0, given.decode
    settings: dict[str, Any] = {}
    for text in given.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: it must be NAME=VALUE")
        inner = settings
        *groups, last = name.split(".")
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return ClusterConfig(
        cost=cost_of(given),
        limits=Limits(
            num_blocks=max(given.kv_tokens // block_size, 1),
            block_size=block_size,
            max_num_seqs=given.max_num_seqs,
            max_num_batched_tokens=given.chunk,
        ),
        decode=decode,
        prefill=prefill,
        policy=policy,
        router=RouterConfig.model_validate(
            {
                "admission": {"max_queue": given.max_queue, "queue_timeout_s": given.queue_timeout_s},
                "policy": settings,
            }
        ),
        routers=given.routers,
        fetching=not given.no_fetch,
        wires=Wires(bytes_per_s=given.gbit * 1e9 / 8),
        stream=StreamConfig(given.index_delay_s, given.index_loss),
        faults=tuple(_fault(text) for text in given.fault),
        seed=given.seed,
    )


def _fault(text: str) -> Fault:
    kind, *numbers = text.split(",")
    try:
        at_s, for_s, *worker = numbers
        return Fault(kind, float(at_s), float(for_s), *(int(number) for number in worker))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--fault {text}: it must be death,AT_S,FOR_S,WORKER or away,AT_S,FOR_S ({error})"
        ) from None


def _fitting(trace: list[Asked], kv_tokens: int) -> list[Asked]:
    """Without requests that no worker could ever hold: a router refuses them."""
    fitting = [asked for asked in trace if asked.prompt_tokens + asked.output_tokens <= kv_tokens]
    if len(fitting) == len(trace):
        return trace
    if any(asked.after is not None for asked in trace):
        raise UsageError(f"--kv-tokens {kv_tokens}: a session outgrows the KV cache of a worker")
    print(
        f"{len(trace) - len(fitting)} requests outgrow a worker's KV cache and are left out", file=sys.stderr
    )
    return fitting


def _run(given: argparse.Namespace) -> None:
    trace, size = trace_of(given)
    trace = _fitting(trace, given.kv_tokens)
    config = config_of(given, given.policy, size)
    found: dict[str, Any] = {"policy": given.policy, "prefill": config.prefill, "decode": config.decode}
    rate = given.rate
    if given.load is not None:
        if not given.load > 0:
            raise UsageError(f"--load {given.load}: it must be above 0")
        capacity = capacity_per_s(config, trace)
        rate = given.load * capacity
        found |= {"load": given.load, "capacity_per_s": round(capacity, 6)}
    cluster = Cluster(config, trace)
    began, began_cpu = time.perf_counter(), time.process_time()
    cluster.run(rate / rate_per_s(trace) if rate is not None else 1.0)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    found |= {"offered_per_s": round(rate or rate_per_s(trace), 6)}
    found |= summary(cluster, Slo(given.slo_ttft_s, given.slo_tpot_s))
    if given.timings:
        found["measured"] = measured(cluster, wall_s, cpu_s)
    text = json.dumps(found, indent=1) + "\n"
    if given.json is not None:
        given.json.write_text(text)
    shown = {key: value for key, value in found.items() if key != "over_time"}
    print(json.dumps(shown, indent=1))
    print(f"simulated {len(trace)} requests in {wall_s:.1f} s", file=sys.stderr)


# --- policies -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _read(path: Path, block_size: int, most: int | None, kv_tokens: int) -> list[Asked]:
    read = read_azure if path.suffix == ".csv" else read_mooncake
    return _fitting(read(path, block_size, most), kv_tokens)


def _stretch(
    path: Path, block_size: int, whole: int | None, kv_tokens: int, most: int, at: float
) -> list[Asked]:
    """So many requests of the trace; `at`: 0 the first ones, 1 the last ones."""
    trace = _read(path, block_size, whole, kv_tokens)
    first = int(at * max(len(trace) - most, 0))
    begin_s = trace[first].at_s
    return [dataclasses.replace(asked, at_s=asked.at_s - begin_s) for asked in trace[first : first + most]]


@functools.lru_cache(maxsize=2)
def _sessions(shape: SessionsShape, block_size: int, most: int, kv_tokens: int) -> list[Asked]:
    return _fitting(sessions(shape, block_size)[:most], kv_tokens)


def _policies(given: argparse.Namespace) -> None:
    for shape in given.shapes:
        if shape not in ("split", "unified"):
            raise UsageError(f"--shapes {shape}: it must be split, unified or both")
    least = min(given.per_worker, given.processes, given.seeds)
    if min(given.sizes) < 2 or min(given.loads) <= 0 or least < 1:
        raise UsageError(
            "--sizes must be at least 2, --loads above 0, --per-worker, --processes and --seeds at least 1"
        )
    cells = []
    for workers in given.sizes:
        most = workers * given.per_worker
        for seed in range(given.seeds):
            for name, size, trace in _sources(given, most, seed):
                for shape in given.shapes:
                    half = workers // 2
                    pools = {"prefill": half, "decode": workers - half}
                    changes = pools if shape == "split" else {"decode": workers}
                    config = dataclasses.replace(
                        config_of(given, "cost", size), seed=given.seed + seed, **changes
                    )
                    cells.append(Cell(name, workers, shape == "split", seed, trace, config))
    slo = Slo(given.slo_ttft_s, given.slo_tpot_s)
    rows: list[Row] = []
    found = {
        "cost": cost_of(given).source,
        "slo": dataclasses.asdict(slo),
        "kv_tokens": given.kv_tokens,
        "chunk": given.chunk,
        "seed": given.seed,
        "fetching": not given.no_fetch,
        "rows": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for row in run_cells(cells, given.policies, given.loads, slo, given.processes):
        rows.append(row)
        print(
            f"{row['trace']} {row['workers']} {'split' if row['split'] else 'unified'} seed {row['seed']} "
            f"load {row['load']:g} "
            f"{row['policy']}: hits {row['hits']:.3f} TTFT p99 {row['ttft_p99_s']:.2f} s",
            flush=True,
        )
        # A run that is cut short leaves what it has found.
        (given.out / "policies.json").write_text(json.dumps(found, indent=1) + "\n")
    write_results(given.out, "policies", found, markdown(found), plot)


def _together(given: argparse.Namespace) -> None:
    found: dict[str, Any] = {"rows": []}
    for path in given.results:
        try:
            rows = json.loads(path.read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: it must be the policies.json of a run ({error})") from None
        found["rows"] += rows
    write_results(given.out, "policies", found, markdown(found), plot)


def _sources(given: argparse.Namespace, most: int, seed: int) -> list[tuple[str, int, Any]]:
    """(name, block size, how to make it): the trace if one was given, and sessions."""
    found: list[tuple[str, int, Any]] = []
    if given.trace is not None:
        size = given.block_size or MOONCAKE_BLOCK
        at = seed / max(given.seeds - 1, 1)
        whole = most if given.seeds == 1 and given.requests is None else given.requests
        stretch = functools.partial(_stretch, given.trace, size, whole, given.kv_tokens, most, at)
        found.append((given.trace.stem, size, stretch))
    if given.trace is None or given.and_sessions:
        size = given.block_size or SESSION_BLOCK
        # Of 6 turns on the average; a few sessions more than are needed.
        count = given.sessions or -(-most // 5)
        shape = SessionsShape(sessions=count, think_s=given.think_s, zipf=given.zipf, seed=given.seed + seed)
        found.append(("sessions", size, functools.partial(_sessions, shape, size, most, given.kv_tokens)))
    return found


# --- fit ------------------------------------------------------------------------------------------------------------


def _fit(given: argparse.Namespace) -> None:
    if given.clock == "cpu" and given.threads != 1:
        raise UsageError(
            f"--clock cpu --threads {given.threads}: processor time tells the wall's with one thread only"
        )
    from bench.simulate.fit import Grid, fit_engine
    from workers.models.catalog import prepare_model

    grid = Grid(chunk=given.chunk, runs=given.runs)
    cost, found = fit_engine(
        prepare_model(given.model, say=print), given.config, given.threads, grid, given.clock, print
    )
    cost.write(given.out)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print("\n| steps | number | median error | p90 |\n|---|---|---|---|")
    for kind, error in found["errors"].items():
        print(f"| {kind} | {error['steps']} | {error['median']:.1%} | {error['p90']:.1%} |")
    names = list(found["checks"][0]["off"])
    print(f"\n| load | {' | '.join(names)} |\n" + "|---" * (len(names) + 1) + "|")
    for check in found["checks"]:
        cells = (
            f"{check['measured'][name]:.4g} → {check['simulated'][name]:.4g} ({check['off'][name]:+.0%})"
            for name in names
        )
        print(f"| {check['load']:.0%} | {' | '.join(cells)} |")
    print(f"\nmeasured → simulated (error). The model is in {given.out}")
