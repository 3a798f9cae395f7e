"""Where a request goes: what a policy is asked, what it sees, and what it answers.

A policy is pure: frozen inputs, an injected random source, no clock and no network. Those that there are stand in
`router/policies/`; `router.policy.name` chooses one of them, or one of your own (docs/routing.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from router.prefix_index import CachedPrefix
from workers.protocol.messages import PeerStatus, Role

PREFILL_EVERYTHING = 2**31 - 1  # as Reserve.local_prefill_max: there is no prefill worker


class WorkerView(NamedTuple):
    """What the policy sees of a worker. The figures are of now (router/load.py: LoadBook)."""

    worker_id: str
    role: Role
    queued_prefill_tokens: int
    active_blocks: int
    recent_requests: float = (
        0.0  # in flight there on the time average of the last seconds, of this router's own
    )
    prefill_token_s: float = 0.0  # seconds to compute a prompt token, as the worker measured; 0: not known
    decode_step_s: float = 0.0  # seconds of a step that only decodes; 0: not known
    host: str = ""  # where it runs; "": not known
    peers: Mapping[str, PeerStatus] = MappingProxyType({})  # ways to those it sends blocks to
    queued_prefill_pairs: int = 0  # of the queued tokens and the positions that they attend to
    prefill_pair_s: float = 0.0  # seconds that such a pair takes; 0: not known


@dataclass(frozen=True, slots=True)
class Demand:
    """What the policy must know of a request."""

    prompt_tokens: int  # to be in the KV cache before the next token; a resumed request's output included
    block_size: int
    cached_blocks: Mapping[str, CachedPrefix]  # worker -> longest cached prefix (PrefixIndex.match)
    token_bytes: int = 0  # of one token's KV on the wire; 0: not known, hand-overs weigh nothing


class Score(NamedTuple):
    """One candidate and why it costs what it costs: cost = queued + prompt − credit + decode, in tokens of work.

    A token of work is the first prompt token on the fastest worker that there is.
    """

    worker_id: str
    role: Role
    queued_prefill_tokens: int
    cached_tokens: int  # in any tier
    uncached_tokens: int
    active_blocks: int
    cost: float
    queued: float = 0.0  # work that waits there already
    prompt: float = 0.0  # work of this request, if nothing were cached
    credit: float = 0.0  # of that, what its cache saves, or what it can fetch
    decode: float = 0.0  # what running streams cost a new one
    heat: float = 0.0  # recent load over the mean of its pool; above 1 it has shrunk the credit
    pace: float = 1.0  # how many times slower it computes than the fastest
    fetch_tokens: int = 0  # of the uncached: cached on another worker, from which it will fetch them

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + self.uncached_tokens

    @property
    def prefill_tokens(self) -> int:
        """That it has to compute."""
        return self.uncached_tokens - self.fetch_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """`prefill` is None when D prefills by itself. `scores` holds the candidates that were weighed, cheapest first,
    D's before P's: everybody whom the policy could not rule out unseen."""

    decode: Score
    prefill: Score | None
    local_prefill_max: int  # tokens; what to tell D in Reserve
    scores: tuple[Score, ...]
    demand: Demand
    distance: float = 0.0  # cost of the hand-over from P to D, in tokens of work

    @property
    def cost(self) -> float:
        """Of the pair."""
        return self.decode.cost + (0.0 if self.prefill is None else self.prefill.cost + self.distance)


class Policy(Protocol):
    """`exclude` are workers that this request must leave alone."""

    def choose(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Choice | None:
        """A decode worker, and a prefill worker unless D does it all. None: no decode worker is left."""

    def choose_prefill(
        self, demand: Demand, views: Iterable[WorkerView], exclude: Collection[str] = ()
    ) -> Score | None:
        """A prefill worker, for a D that turned out to need one. None: there is none."""


def plain_score(demand: Demand, view: WorkerView, cost: float = 0.0) -> Score:
    """A score with the facts of a candidate and somebody's own idea of its cost."""
    prefix = demand.cached_blocks.get(view.worker_id)
    cached = 0 if prefix is None else min(prefix.blocks * demand.block_size, demand.prompt_tokens)
    return Score(
        worker_id=view.worker_id,
        role=view.role,
        queued_prefill_tokens=view.queued_prefill_tokens,
        cached_tokens=cached,
        uncached_tokens=demand.prompt_tokens - cached,
        active_blocks=view.active_blocks,
        cost=cost,
    )


def fetch_from(
    demand: Demand, worker_id: str, reachable: Callable[[str], bool], min_tokens: int
) -> tuple[str, int] | None:
    """Another worker whose cached prefix is at least `min_tokens` longer than this one's, and its length in blocks.

    How far it pays to fetch it the worker judges, who has measured the way.
    """
    own = demand.cached_blocks.get(worker_id)
    least = (0 if own is None else own.blocks) + min_tokens / demand.block_size
    best: tuple[int, str] | None = None
    for other, prefix in demand.cached_blocks.items():
        blocks = prefix.blocks if not (prefix.host or prefix.disk) else prefix.device
        if blocks < least or other == worker_id or (best is not None and (blocks, other) < best):
            continue
        if reachable(other):
            best = (blocks, other)
    return None if best is None else (best[1], best[0])
