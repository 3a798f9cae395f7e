"""A rank's part in its expert-parallel group: turns in lockstep, views, and the switch from one placement to the next.

The engine asks `begin` before each step. While any rank has work all of them make the step, those without tokens of
their own for the others' tokens; while none has, all sleep, and the first that gets work wakes the others. In the
headers that go round at the beginning of a turn the ranks also learn what all of them are ready for: between two
turns, and at the same one everywhere, they begin to use another placement.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from workers.experts.copies import LayerCopies
from workers.experts.exchange import Exchange, GroupBroken, Shape
from workers.experts.holdings import Holdings, Source
from workers.experts.meeting import Host, Hosted, open_exchange
from workers.experts.membership import Stranded
from workers.experts.messages import Member, View
from workers.experts.parallel import Route
from workers.experts.remaining import over_members
from workers.experts.switching import Switch, of_rank
from workers.protocol.experts import Placement, PlacementError, contiguous

logger = logging.getLogger(__name__)

_RETRY_S = 0.5  # after a view that could not be entered
_WORK, _NEW_VIEW = 1, 2  # flags of a header
_FLAGS, _TURN, _AIM, _READY = range(4)  # its words


@dataclass(frozen=True, slots=True)
class ExpertModel:
    """What a group has to know of the model."""

    num_layers: int  # that have experts
    num_experts: int  # in each of these
    shape: Shape


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """For those who look at the group from other threads."""

    view: int
    members: tuple[int, ...]  # ranks
    version: int
    experts: tuple[tuple[int, ...], ...]  # [layer][slot], of this rank
    shares: tuple[tuple[float, ...], ...] | None  # the same of the shares
    lacking: str  # why there is no view; "" while there is one
    ready: int  # newest version for which everything is here
    refused: int  # newest version that can't be carried out here
    reason: str  # why


class Views(Protocol):
    """As workers/experts/membership.py."""

    @property
    def newcomers(self) -> bool: ...

    @property
    def rung(self) -> int: ...

    @property
    def ended(self) -> bool: ...

    def ring(self, turn: int) -> None: ...

    def end(self, number: int, reason: str) -> None: ...

    def next_view(self, compose: Callable[[int, Sequence[Member]], View]) -> View: ...


class ExpertGroup:
    """`begin`, `end_view` and `route` belong on the engine's thread, `abort`, `propose` and `status` on any."""

    def __init__(
        self,
        rank: int,
        size: int,
        slots: int,
        model: ExpertModel,
        source: Source,
        host: Host,
        *,
        staging: int,
        on_wake: Callable[[], None],
    ) -> None:
        """`slots`: experts of a layer that a rank has memory for. Raises ValueError when all ranks can't hold all."""
        self._rank, self._size, self.slots = rank, size, slots
        self.model, self._host, self._on_wake = model, host, on_wake
        if size * slots < model.num_experts:
            raise ValueError(
                f"experts.slots is {slots}: {size} ranks hold {size * slots} of the {model.num_experts} experts of a layer"
            )
        self.capacity = slots * model.num_layers + staging
        self.holdings = Holdings(model.num_layers, source, self.capacity, on_wake)
        self.views: Views | None = None
        self.exchange: Exchange
        self._hosted: Hosted | None = None
        self._view: View | None = None
        self._turn = 0
        self._idle = True
        self._announced = (-1, -1)  # the aim and the layers of it that the others know us to be ready for
        self._wanted = contiguous(model.num_layers, model.num_experts, size, version=1)
        self._proposed: Placement | None = None
        self._switch = Switch(self._wanted)
        self._aim = 0  # names what is being loaded: its version does not say which ranks it is for
        self._routes: list[Route] = []
        self._lacking, self._refused, self._reason = "the ranks have not met so far", 0, ""
        self.on_lacking: Callable[[str], None] = lambda reason: None
        self.on_whole: Callable[[], None] = lambda: None  # there is a view again
        self.status = self._status()

    def close(self) -> None:
        self.abort()
        self.holdings.close()
        if self._hosted is not None:
            self._hosted.close()

    # --- turns ------------------------------------------------------------------------------------------------------

    def begin(self, has_work: bool) -> bool:
        """Whether there is a step to be made by all ranks now. Raises GroupBroken, GroupClosed."""
        assert self.views is not None
        while True:
            if self._view is None or self.views.ended:
                self._enter()
            self._heed_proposal()
            turn = self._turn + 1
            if self._idle and not self._calls(has_work):
                if self.views.rung < turn:
                    return False
            elif self._idle:
                self.views.ring(turn)
            headers = self._meet(turn, has_work)
            self._idle = not (headers[:, _FLAGS] & _WORK).any()
            if (headers[:, _FLAGS] & _NEW_VIEW).any():
                self.end_view("somebody new has come")
                continue
            self._advance(headers)
            return not self._idle

    def end_view(self, reason: str) -> None:
        """What has begun can't be ended, here or elsewhere; the next `begin` waits for the next view."""
        assert self.views is not None
        if self._view is not None:
            self.views.end(self._view.number, reason)

    def abort(self) -> None:
        """Let go whoever waits for other ranks."""
        exchange = getattr(self, "exchange", None)
        if exchange is not None:
            exchange.abort()

    def route(self, layer: int) -> Route:
        return self._routes[layer]

    def holders(self, layer: int, expert: int) -> list[str]:
        """Addresses of the other ranks that compute with it."""
        view, now = self._view, self._switch.now
        if view is None:
            return []
        return [
            member.address
            for member in view.members
            if member.rank != self._rank and expert in now.layers[layer][member.rank]
        ]

    def _calls(self, has_work: bool) -> bool:
        """Whether this rank has something for all."""
        assert self.views is not None
        return has_work or self.views.newcomers or self._progress() != self._announced

    def _progress(self) -> tuple[int, int]:
        return self._aim, self.holdings.ready

    def _meet(self, turn: int, has_work: bool) -> NDArray[np.int64]:
        assert self.views is not None
        aim, ready = progress = self._progress()
        flags = (_WORK if has_work else 0) | (_NEW_VIEW if self.views.newcomers else 0)
        headers = self.exchange.headers(np.array([flags, turn, aim, ready]))
        if (headers[:, _TURN] != turn).any():
            raise GroupBroken(f"the ranks are in turns {headers[:, _TURN].tolist()}")
        self._turn, self._announced = turn, progress
        return headers

    # --- placements -------------------------------------------------------------------------------------------------

    def propose(self, placement: Placement) -> None:
        """Compute with this one as soon as all ranks can. Every rank has to hear of it."""
        self._proposed = placement
        self._on_wake()

    def _heed_proposal(self) -> None:
        proposed, self._proposed = self._proposed, None
        if proposed is None or proposed.version <= max(self._wanted.version, self._refused):
            return
        try:
            proposed.validate(self.model.num_experts, [self.slots] * self._size, self.model.num_layers)
            aim = over_members(proposed, self.model.num_experts, self._ranks, self.slots)
            self._switch.check_room(aim, self._ranks, self.capacity)
        except PlacementError as error:
            self._refused, self._reason = proposed.version, str(error)
            logger.warning("placement %d is refused: %s", proposed.version, error)
        else:
            self._wanted = proposed
            self._take_aim(aim)
        self.status = self._status()

    def _take_aim(self, aim: Placement) -> None:
        self._switch.towards(aim)
        self._aim = _digest(aim)
        self.holdings.aim(of_rank(aim, self._rank))

    def _advance(self, headers: NDArray[np.int64]) -> None:
        """Begin to use the layers of the aim that every rank holds."""
        switch = self._switch
        if (headers[:, _AIM] != self._aim).any():
            return
        before = switch.done
        changed = switch.advance(int(headers[:, _READY].min()))
        for layer in changed:
            self.holdings.use(layer, switch.now.layers[layer][self._rank])
            self._routes[layer] = self._new_route(layer)
        if switch.ended and changed:
            logger.info("placement %d is in use", switch.now.version)
        if switch.done > before:
            self.status = self._status()

    def _new_route(self, layer: int) -> Route:
        members, now = self._ranks, self._switch.now
        copies = LayerCopies(now, layer, self.model.num_experts, members, members.index(self._rank))
        return Route(copies, self.holdings.install(layer), len(now.layers[layer][self._rank]))

    # --- views ------------------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> list[int]:
        return [] if self._view is None else self._view.ranks

    def _enter(self) -> None:
        """Wait for the next view and make ready for its first turn."""
        assert self.views is not None
        self.abort()
        view = self.views.next_view(self._compose)
        if self._view is None or view.wanted.version > self._wanted.version:
            self._wanted = view.wanted
        self._view, self._switch = view, Switch(view.placement)
        try:
            self.holdings.settle(of_rank(view.placement, self._rank))
            self.exchange = open_exchange(view, self._rank, self.model.shape, self._host)
        except Exception as error:
            logger.exception("view %d of the expert group can't be entered", view.number)
            time.sleep(_RETRY_S)
            raise GroupBroken(f"rank {self._rank} could not enter view {view.number}: {error}") from error
        if self.views.ended:  # before there was anything to abort
            self.exchange.abort()
        self._routes = [self._new_route(layer) for layer in range(self.model.num_layers)]
        self._turn, self._idle, self._announced, self._lacking = 0, True, (-1, -1), ""
        self._take_aim(self._nearest())
        self.status = self._status()
        logger.info("view %d of the expert group: ranks %s", view.number, view.ranks)
        self.on_whole()

    def _nearest(self) -> Placement:
        """To what is wanted, of what these members can come to."""
        aim = over_members(self._wanted, self.model.num_experts, self._ranks, self.slots)
        try:
            self._switch.check_room(aim, self._ranks, self.capacity)
        except PlacementError as error:
            logger.warning("placement %d has to wait for another: %s", aim.version, error)
            return self._switch.now
        return aim

    def _compose(self, number: int, members: Sequence[Member]) -> View:
        """The next view, when this rank leads it. Raises Stranded."""
        ranks = [member.rank for member in members]
        try:
            placement = over_members(self._switch.now, self.model.num_experts, ranks, self.slots)
        except PlacementError as error:
            raise Stranded(str(error)) from None
        if self._hosted is not None:
            self._hosted.close()
        try:
            self._hosted = self._host.meeting(members, self.model.shape)
        except OSError as error:
            raise Stranded(f"the ranks can't meet: {error}") from None
        return View(number, tuple(members), placement, self._wanted, self._hosted.meeting)

    def lacking(self, reason: str) -> None:
        """There is no view, and there will be none before somebody comes. From any thread."""
        if reason != self._lacking:
            logger.error("the expert group can't go on: %s", reason)
        self._lacking = reason
        self.status = self._status()
        self.on_lacking(reason)

    def _status(self) -> GroupStatus:
        switch, now = self._switch, self._switch.now
        ready = switch.ended or self.holdings.ready == self.model.num_layers
        return GroupStatus(
            view=0 if self._view is None else self._view.number,
            members=tuple(self._ranks),
            version=now.version,
            experts=tuple(of_rank(now, self._rank)),
            shares=None if now.shares is None else tuple(ranks[self._rank] for ranks in now.shares),
            lacking=self._lacking,
            ready=switch.aim.version if ready else now.version,
            refused=self._refused,
            reason=self._reason,
        )


def _digest(placement: Placement) -> int:
    """In 63 bits."""
    return int.from_bytes(hashlib.sha256(msgspec.msgpack.encode(placement)).digest()[:8], "big") >> 1
