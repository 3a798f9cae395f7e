"""The options, named as in nccl-tests where it has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kernels.nccl_tests.collectives import BACKENDS
from kernels.nccl_tests.errors import BadArguments
from kernels.nccl_tests.plan import DTYPES, OPERATIONS, REDOPS, Case, cases, parse_size, roots, select, sizes
from kernels.nccl_tests.rank import Repeats
from kernels.nccl_tests.report import Run


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; `values` is all of it, for the report."""

    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    redops: tuple[str, ...]
    root: str
    repeats: Repeats
    backend: str
    num_ranks: int | None
    devices: tuple[int, ...]
    timeout_s: float
    json_file: Path | None
    rank: int | None
    world_size: int | None
    init: str | None
    led: bool
    extra: argparse.Namespace
    values: dict[str, Any]

    def cases(self, num_ranks: int) -> list[Case]:
        root = roots(self.root, num_ranks)
        return [
            case
            for operation in self.operations
            for case in cases(operation, self.sizes, self.dtypes, self.redops, root, num_ranks)
        ]

    def run(self, num_ranks: int, how: str) -> Run:
        return Run(self.backend, how, self.cases(num_ranks), self.repeats, self.values, self.json_file)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArguments(f"{message} (--help lists all options)")


def parser(program: str) -> argparse.ArgumentParser:
    """For callers that add options of their own, which come back as `Options.extra`."""
    made = _Parser(
        prog=program,
        description="Measure the collectives: time, bandwidth and correctness, like NVIDIA's nccl-tests.",
        allow_abbrev=False,
    )
    made.add_argument(
        "operation",
        nargs="?",
        default="all_reduce",
        help=f"all or any of {', '.join(OPERATIONS)}; default all_reduce",
    )
    group = made.add_argument_group("sizes (8, 4K, 1M, 1G)")
    group.add_argument("-b", "--minbytes", default="32M", metavar="SIZE", help="smallest; default 32M")
    group.add_argument("-e", "--maxbytes", default="32M", metavar="SIZE", help="largest; default 32M")
    group.add_argument(
        "-i", "--stepbytes", metavar="SIZE", help="added to a size to get the next; default 1M"
    )
    group.add_argument("-f", "--stepfactor", type=int, metavar="N", help="times a size is the next, instead")
    group = made.add_argument_group("what")
    group.add_argument(
        "-d", "--datatype", default="float", help=f"all or any of {', '.join(DTYPES)}; default float"
    )
    group.add_argument("-o", "--op", default="sum", help=f"all or any of {', '.join(REDOPS)}; default sum")
    group.add_argument("-r", "--root", default="0", help="all or a rank, for broadcast and reduce; default 0")
    group = made.add_argument_group("how often")
    group.add_argument("-n", "--iters", type=int, default=20, metavar="N", help="timed; default 20")
    group.add_argument(
        "-w",
        "--warmup_iters",
        "--warmup-iters",
        type=int,
        default=5,
        metavar="N",
        help="before them; default 5",
    )
    group.add_argument(
        "-c", "--check", type=int, default=1, metavar="N", help="checked runs; 0: none; default 1"
    )
    group = made.add_argument_group("where")
    group.add_argument("--backend", choices=BACKENDS, default="nccl", help="gloo: on CPUs; default nccl")
    group.add_argument(
        "-g",
        "--ngpus",
        "--ranks",
        type=int,
        metavar="N",
        help="ranks; all GPUs, or 2 with gloo, unless given",
    )
    group.add_argument("--devices", metavar="0,1", help="GPUs of this host, by number")
    group.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for one step of a size; default 60"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here, too")
    return made


def add_rendezvous(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("several hosts: one process for each rank")
    group.add_argument("--rank", type=int, metavar="R")
    group.add_argument("--world-size", type=int, metavar="N")
    group.add_argument("--init", metavar="HOST:PORT", help="where rank 0 listens")
    group.add_argument("--led", action="store_true", help=argparse.SUPPRESS)


def parse(made: argparse.ArgumentParser, arguments: Sequence[str]) -> Options:
    """Raises BadArguments."""
    found = made.parse_args(list(arguments))
    for option, number, least in (
        ("--iters", found.iters, 1),
        ("--warmup_iters", found.warmup_iters, 0),
        ("--check", found.check, 0),
        ("--ngpus", found.ngpus if found.ngpus is not None else 1, 1),
    ):
        if number < least:
            raise BadArguments(f"{option} is {number}; it must be at least {least}")
    if not 0 < found.timeout < float("inf"):
        raise BadArguments(f"--timeout is {found.timeout:g}; it must be a number of seconds above 0")
    if found.stepbytes is not None and found.stepfactor is not None:
        raise BadArguments("--stepbytes and --stepfactor were both given; choose one")
    devices = _devices(found.devices)
    if devices and found.backend != "nccl":
        raise BadArguments(f"--devices names GPUs, which the backend {found.backend} does not use")
    if devices and found.ngpus not in (None, len(devices)):
        raise BadArguments(f"--ngpus is {found.ngpus}, but --devices names {len(devices)}")
    if found.json is not None and not found.json.absolute().parent.is_dir():
        raise BadArguments(f"--json: there is no directory {found.json.absolute().parent}")
    rank, world_size, init = (getattr(found, name, None) for name in ("rank", "world_size", "init"))
    _check_rendezvous(rank, world_size, init)
    return Options(
        operations=tuple(select("operation", found.operation, list(OPERATIONS))),
        sizes=tuple(
            sizes(
                parse_size(found.minbytes),
                parse_size(found.maxbytes),
                parse_size(found.stepbytes or "1M"),
                found.stepfactor,
            )
        ),
        dtypes=tuple(select("--datatype", found.datatype, list(DTYPES))),
        redops=tuple(select("--op", found.op, REDOPS)),
        root=found.root,
        repeats=Repeats(found.warmup_iters, found.iters, found.check),
        backend=found.backend,
        num_ranks=found.ngpus or len(devices) or None,
        devices=devices,
        timeout_s=found.timeout,
        json_file=found.json,
        rank=rank,
        world_size=world_size,
        init=init,
        led=getattr(found, "led", False),
        extra=found,
        values={
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(found).items()
            if name != "led"
        },
    )


def _devices(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise BadArguments(f"--devices is {text!r}; write the numbers of GPUs, as in 0,1")
    return tuple(int(part) for part in parts)


def _check_rendezvous(rank: int | None, world_size: int | None, init: str | None) -> None:
    given = [value is not None for value in (rank, world_size, init)]
    if not any(given):
        return
    if not all(given):
        raise BadArguments("--rank, --world-size and --init belong together: give all three or none")
    assert rank is not None
    assert world_size is not None
    if world_size < 1 or not 0 <= rank < world_size:
        raise BadArguments(
            f"--rank is {rank} and --world-size {world_size}; ranks go from 0 to world size - 1"
        )
