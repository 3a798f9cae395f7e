"""`headrace nccl-test`: the collectives between the GPUs of a Ray cluster, an actor for each of them.

Ray finds the GPUs, starts the ranks and carries the questions and answers; what is measured never goes through it.
"""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.actors import death_reason
from cluster.config import ConfigError, load_config
from cluster.ray_runtime import RayError, RayRuntime, machine
from cluster.session import Session
from kernels.nccl_tests.collectives import About
from kernels.nccl_tests.errors import BackendMissing, BadArguments, NcclTestError, RendezvousError
from kernels.nccl_tests.local import make_rank
from kernels.nccl_tests.options import Options, add_rendezvous, parse, parser
from kernels.nccl_tests.plan import Case
from kernels.nccl_tests.program import USAGE, WRONG, complain, leave, measure, told_to_end
from kernels.nccl_tests.rank import Rank, Repeats, Result
from kernels.nccl_tests.report import perform
from kernels.nccl_tests.team import Team

_PLACE_S = 60.0
_START_S = 120.0  # for an actor to start and to import its libraries on a busy machine
_INTERRUPTED = 130


class RankActor:
    """A rank in a process of Ray's, which has hidden all GPUs but this rank's."""

    def __init__(self, backend: str, timeout_s: float) -> None:
        self._backend, self._timeout_s = backend, timeout_s
        self._rank: Rank | None = None

    def place(self) -> tuple[str, list[int]]:
        """Address of this machine, and Ray's numbers of the GPUs here."""
        ray: Any = importlib.import_module("ray")
        return ray.util.get_node_ip_address(), [int(gpu) for gpu in ray.get_gpu_ids() if str(gpu).isdigit()]

    def about(self) -> About:
        """Opens the backend; what it lacks is said in an answer, which an actor's constructor could not give."""
        if self._rank is None:
            self._rank = make_rank(self._backend, self._timeout_s, 0, self.place()[0])
        return self._rank.about()

    def make_id(self) -> str:
        return self._opened().make_id()

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self._opened().join(unique_id, rank, num_ranks)

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._opened().allocate(send_bytes, recv_bytes)

    def measure(self, case: Case, repeats: Repeats) -> Result:
        return self._opened().measure(case, repeats)

    def close(self) -> None:
        self._opened().close()

    def _opened(self) -> Rank:
        assert self._rank is not None, "about() comes first"
        return self._rank


class RayRank:
    """A member of the team, in an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._name = "a rank"

    def place(self) -> tuple[str, list[int]]:
        found: tuple[str, list[int]] = self._ask("place", timeout_s=_START_S)
        return found

    def about(self) -> About:
        found: About = self._ask("about")
        return found

    def make_id(self) -> str:
        found: str = self._ask("make_id")
        return found

    def join(self, unique_id: str, rank: int, num_ranks: int) -> None:
        self._name = f"rank {rank}"
        self._ask("join", unique_id, rank, num_ranks)

    def allocate(self, send_bytes: int, recv_bytes: int) -> None:
        self._ask("allocate", send_bytes, recv_bytes)

    def measure(self, case: Case, repeats: Repeats) -> Result:
        found: Result = self._ask("measure", case, repeats)
        return found

    def close(self) -> None:
        self._ask("close")

    def _ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        ray: Any = importlib.import_module("ray")
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NcclTestError):
                raise error.cause from None
            raise NcclTestError(f"{self._name}: {method}: {death_reason(error)}") from None
        except ray.exceptions.GetTimeoutError:
            raise RendezvousError(f"the actor of {self._name} did not start within {timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            raise RendezvousError(f"{self._name} is gone: {death_reason(error)}") from None


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, 1 when the run failed or elements were wrong, 2 for a mistake in the options."""
    made = parser("headrace nccl-test")
    _add_ray(made)
    add_rendezvous(made)
    options: Options | None = None
    try:
        options = parse(made, arguments)
        with told_to_end():
            correct = _measure_on_ray(options) if _wants_ray(options) else measure(options)
        return 0 if correct else WRONG
    except (BadArguments, ConfigError) as error:
        return complain(error, USAGE)
    except (NcclTestError, RayError) as error:
        status = complain(error, WRONG)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    if options is not None and options.backend == "nccl" and not _wants_ray(options):
        leave(status)  # a thread of this process may hang in NCCL
    return status


def _add_ray(made: ArgumentParser) -> None:
    group = made.add_argument_group("Ray: an actor for each rank")
    group.add_argument("--ray-address", metavar="ADDRESS", help="cluster to join: auto or host:port")
    group.add_argument(
        "--ray",
        action=BooleanOptionalAction,
        default=None,
        help="start a Ray here when none is joined; --no-ray: ranks of this host without it. "
        "With GPUs Ray is the default, with gloo processes without Ray are",
    )


def _wants_ray(options: Options) -> bool:
    ray, address = options.extra.ray, options.extra.ray_address
    if options.rank is not None or options.devices:
        if ray or address:
            raise BadArguments(
                "--rank and --devices are for ranks without Ray: leave out --ray and --ray-address"
            )
        return False
    if address:
        if ray is False:
            raise BadArguments("--ray-address names a cluster to join and --no-ray forbids it: choose one")
        return True
    return options.backend == "nccl" if ray is None else bool(ray)


def _measure_on_ray(options: Options) -> bool:
    joins = options.extra.ray_address is not None
    here = machine().hosts[0]
    if not joins and options.backend == "nccl" and here.gpus < 1:
        from kernels.nccl_tests.nccl_backend import load

        load()  # knows what is missing
        raise BackendMissing("no NVIDIA GPU is visible here; --ray-address joins a cluster that has some")
    runtime = RayRuntime(load_config(None, {"ray.address": options.extra.ray_address} if joins else {}))
    files = runtime.make_files()
    session = Session(files) if files is not None else None
    try:
        wanted = options.num_ranks or (int(here.gpus) if options.backend == "nccl" else 2)
        runtime.start(num_cpus=wanted, num_gpus=here.gpus)
        num_ranks = _num_ranks(options, runtime)
        with _ray_team(options, num_ranks) as team:
            where = f"of the cluster at {options.extra.ray_address}" if joins else "started here"
            return perform(options.run(num_ranks, f"an actor each on the Ray {where}"), team)
    finally:
        runtime.stop()
        if session is not None:
            session.kill_processes()
            session.close()


def _num_ranks(options: Options, runtime: RayRuntime) -> int:
    """What was asked for, or all GPUs. An impossible placement would only hang, so it is refused before."""
    hosts = runtime.inventory().hosts
    kind = "GPU" if options.backend == "nccl" else "CPU"
    there = int(sum(host.gpus if kind == "GPU" else host.cpus for host in hosts))
    wanted = options.num_ranks or (there if kind == "GPU" else 2)
    if there < max(wanted, 1):
        message = f"{max(wanted, 1)} ranks need a {kind} each; this Ray has {there}, on nodes: {len(hosts)}"
        if kind == "GPU":
            raise BackendMissing(f"{message}. On CPUs the same test runs with --backend gloo.")
        raise BadArguments(message)
    return wanted


@contextmanager
def _ray_team(options: Options, num_ranks: int) -> Iterator[Team]:
    """Ranks next to each other are on one machine where possible, as a ring wants it."""
    ray: Any = importlib.import_module("ray")
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    kind = "GPU" if options.backend == "nccl" else "CPU"
    # CPU ranks are there to try the network between machines, so they are spread over them.
    group = placement_group([{kind: 1}] * num_ranks, strategy="PACK" if kind == "GPU" else "SPREAD")
    actors: list[Any] = []
    try:
        if not group.wait(_PLACE_S):
            free = ray.available_resources().get(kind, 0)
            raise RendezvousError(
                f"{num_ranks} ranks found no place within {_PLACE_S:g} s: {free:g} {kind}s are free; "
                "is another program using the Ray cluster?"
            )
        remote = ray.remote(num_cpus=1 if kind == "CPU" else 0, num_gpus=1 if kind == "GPU" else 0)(RankActor)
        for index in range(num_ranks):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actors.append(
                remote.options(scheduling_strategy=strategy).remote(options.backend, options.timeout_s)
            )
        members: list[RayRank] = sorted((RayRank(actor) for actor in actors), key=RayRank.place)
        yield Team(members)
    finally:
        for actor in actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(group)
