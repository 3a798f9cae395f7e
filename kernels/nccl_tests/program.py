"""`python -m kernels.nccl_tests`: everything that needs no Ray."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from kernels.nccl_tests.errors import BadArguments, NcclTestError
from kernels.nccl_tests.local import follow_leader, gpu_team, leading_team, process_team
from kernels.nccl_tests.options import Options, add_rendezvous, parse, parser
from kernels.nccl_tests.report import perform

WRONG, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the run failed or elements were wrong, 2 for a mistake in the options."""
    made = parser("python -m kernels.nccl_tests")
    add_rendezvous(made)
    led = False
    try:
        options = parse(made, sys.argv[1:] if arguments is None else arguments)
        led = options.led
        with told_to_end():
            return 0 if measure(options) else WRONG
    except BadArguments as error:
        return complain(error, USAGE)
    except NcclTestError as error:
        return WRONG if led else complain(error, WRONG)  # its leader says it
    except KeyboardInterrupt:
        return 130


def measure(options: Options) -> bool:
    """Run in one process or several. Answers whether no element was wrong. Raises NcclTestError."""
    if options.rank is not None and (options.rank > 0 or options.led):
        follow_leader(options)
        return True
    if options.world_size is not None:
        num_ranks = options.world_size
        run = options.run(num_ranks, f"a process each, met at {options.init}")
        with leading_team(options) as team:
            return perform(run, team)
    if options.backend == "gloo":
        run = options.run(options.num_ranks or 2, "a process each on this host")
        with process_team(options) as team:
            return perform(run, team)
    team = gpu_team(options)
    return perform(options.run(len(team), "a thread each in one process"), team)


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: in order, with all that it started."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return status


def leave(status: int) -> None:
    """End this process at once: a thread that hangs in an aborted collective must not hold it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
