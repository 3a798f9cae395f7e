"""What a router knows of one group from look to look: its load, its ranks, the last verdict and plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from router.config import ExpertsConfig
from router.experts import rebalancer
from router.experts.balance import Balance, balance, rank_loads
from router.experts.group import Group
from router.experts.loads import CountsError, Loads
from router.experts.rebalancer import TROUBLE, Phase, Seen, State, Verdict
from router.experts.windows import Array
from workers.protocol.expert_messages import ExpertCounts, ExpertPost

log = logging.getLogger(__name__)

_QUIET = (Phase.WAITING, Phase.BALANCED)  # phases whose text changes all the time
_REFUSED_COUNTS = 3  # told of, then only counted


@dataclass(frozen=True)
class Planned:
    """What the last attempt to plan came to, on this router."""

    at: float  # s since 1970
    text: str
    posted: int = 0  # version; 0: it was not


class Watched:
    """`now` is time.monotonic()."""

    def __init__(self, group: Group, config: ExpertsConfig) -> None:
        self.group = group
        self.state = State()
        self.verdict = Verdict(Phase.WAITING, "nothing is known yet")
        self.post: ExpertPost | None = None
        self.planned: Planned | None = None
        self.planning = False
        self.refused_counts = 0
        self.loads = Loads(
            group.num_layers,
            group.num_experts,
            len(group.ranks),
            window_s=config.window_s,
            half_life_s=config.half_life_s,
            enough=config.min_tokens,
        )
        self._config = config

    def fits(self, group: Group) -> bool:
        """False: the name is another model's now, and everything here is void."""
        loads = self.loads
        return (loads.layers, loads.experts, loads.ranks) == (
            group.num_layers,
            group.num_experts,
            len(group.ranks),
        )

    def take(self, counts: ExpertCounts, now: float) -> None:
        try:
            self.loads.take(counts, now)
        except CountsError as error:
            self.refused_counts += 1
            if self.refused_counts <= _REFUSED_COUNTS:
                log.warning("experts: counts that can't be used: %s", error)

    def seen(self, now: float) -> Seen:
        heard_at = self.loads.heard_at
        return Seen(
            self.group,
            self.loads.halves(),
            None if heard_at is None else now - heard_at,
            self.loads.expert_share(),
        )

    def look(self, group: Group, post: ExpertPost | None, now: float) -> Verdict:
        """Takes in what the ranks say now. What has changed is told in the log."""
        self.group, self.post = group, post
        if group.settled:
            self.loads.placed(group.version)
        if post is not None and post.placement.version > group.version:
            self.state = rebalancer.heard_of(self.state, post.placement.version, now)
        verdict, self.state = rebalancer.look(self.seen(now), self.state, self._config, now)
        self._tell(verdict)
        self.verdict = verdict
        return verdict

    @property
    def trouble(self) -> bool:
        """Something keeps experts from being placed, and somebody should look into it."""
        return self.verdict.phase in TROUBLE

    def _tell(self, verdict: Verdict) -> None:
        before = self.verdict
        if (verdict.phase, verdict.phase in TROUBLE or verdict.text) == (
            before.phase,
            before.phase in TROUBLE or before.text,
        ):
            return
        if verdict.phase in TROUBLE:
            log.warning("experts of group %s: %s: %s", self.group.name, verdict.phase, verdict.text)
        elif verdict.phase not in _QUIET:
            log.info("experts of group %s: %s: %s", self.group.name, verdict.phase, verdict.text)
        elif before.phase is not verdict.phase:
            level = logging.INFO if before.phase in TROUBLE else logging.DEBUG
            log.log(level, "experts of group %s: %s: %s", self.group.name, verdict.phase, verdict.text)

    def measured(self, now: float) -> Balance | None:
        """Of what the ranks really computed. None: nothing was counted with this placement."""
        computed: Array = self.loads.computed()
        return balance(computed, self.group.topology()) if computed.any() else None

    def predicted(self, now: float) -> Balance | None:
        """Of the present load under the present placement."""
        placement = self.group.placement()
        routed = self.loads.routed()
        if placement is None or not routed.any():
            return None
        return balance(rank_loads(placement, routed), self.group.topology())
