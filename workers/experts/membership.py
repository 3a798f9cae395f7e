"""Who is in the group: one leader, to whom every other rank holds a connection, and views that follow one another.

A view ends when one of its members is lost or fails, or when somebody new has come. Its members then leave the step
(their exchange is aborted), go aboard at the leader, and get the next view from it. When the leader is lost, the
others look for one another. Nothing is decided by vote, because nothing has to be: a group that falls into two halves
computes right tokens in both, and the half that can't hold all experts says so.

Whoever is in no group asks the others: a leader of a formed group takes anybody; while none is formed, the one that was
in the latest view and has the lowest rank takes those behind it, until nobody is missing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.experts.acquaintances import Acquaintances, Following
from workers.experts.link import Link, tell
from workers.experts.messages import (
    Aboard,
    Beat,
    Broken,
    Elsewhere,
    Join,
    Joined,
    Lacking,
    Member,
    View,
    Wake,
)
from workers.protocol.frames import ProtocolError

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # between two rounds of asking for a leader
_STRANDED_S = 2.0  # after which a leader whose view can't be formed asks the others again
_REGROUP_S = 1.5  # given to survivors of a lost leader that neither come nor refuse


class Stranded(Exception):
    """Those who are there can't form a view: the message says what is lacking."""


class GroupClosed(Exception):
    """This rank is about to stop."""


@dataclass(slots=True, eq=False)
class _Follower:
    link: Link
    member: Member
    view: int  # the last it was in
    aboard: bool = False


class Membership:
    def __init__(
        self,
        me: Member,
        size: int,
        acquaintances: Acquaintances,
        *,
        heartbeat_s: float,
        timeout_s: float,
        on_broken: Callable[[str], None],
        on_wake: Callable[[], None],
        on_stranded: Callable[[str], None],
    ) -> None:
        """`size`: of the whole group. The callbacks come on any thread."""
        self.me, self._size, self._acquaintances = me, size, acquaintances
        self._heartbeat_s, self._timeout_s = heartbeat_s, timeout_s
        self._on_broken, self._on_wake, self._on_stranded = on_broken, on_wake, on_stranded
        self._changed = threading.Condition()
        self._leader: Link | None = None
        self._leading: Member | None = None  # whom this rank follows
        self._formed = False  # this rank leads a view
        self._followers: dict[int, _Follower] = {}
        self._view: View | None = None
        self._ended = True  # the view is over
        self._next: View | None = None  # came from the leader
        self._rung = 0  # the latest turn of this view that somebody has called for
        self._over = 0  # the number of the latest view that was called over
        self._closing = False

    def start(self) -> None:
        threading.Thread(target=self._beat, name="experts-beat", daemon=True).start()

    def close(self) -> None:
        """The others see this rank leave. Wakes who waits here. Idempotent."""
        with self._changed:
            self._closing = True
            links = self._links()
            self._changed.notify_all()
        for link in links:
            link.close()

    # --- for the engine's thread ------------------------------------------------------------------------------------

    @property
    def newcomers(self) -> bool:
        """Somebody waits for the next view. Known to the leader alone."""
        view = self._view
        return view is not None and any(
            one.member not in view.members for one in list(self._followers.values())
        )

    @property
    def rung(self) -> int:
        return self._rung

    def ring(self, turn: int) -> None:
        """Have everybody take part in this turn of the present view."""
        with self._changed:
            if self._ended or turn <= self._rung or self._view is None:
                return
            self._rung = turn
            wake, links = Wake(self._view.number, turn), self._links()
        tell(links, wake)

    @property
    def ended(self) -> bool:
        """The present view is over."""
        return self._ended

    def end(self, number: int, reason: str) -> None:
        """The view with this number can't go on. Idempotent; from any thread."""
        with self._changed:
            self._over = max(self._over, number)
            if self._number != number or self._ended:
                return
            self._ended = True
            self._changed.notify_all()
            told = self._links()
        logger.info("%s: view %d of its expert group ends: %s", self.me.worker_id, number, reason)
        self._on_broken(reason)
        tell(told, Broken(number, reason))

    def next_view(self, compose: Callable[[int, Sequence[Member]], View]) -> View:
        """Wait for the view after the present one, which is over for this rank. Raises GroupClosed.

        `compose` makes it, on the leader: from its number and its members. Raises Stranded.
        """
        self.end(self._number, "the next one is due")
        while True:
            if self._leader is None and not self._formed:
                self._find_group()
            view = self._lead(compose) if self._formed else self._follow()
            if view is not None:
                return view

    @property
    def _number(self) -> int:
        return self._view.number if self._view is not None else 0

    # --- leading ----------------------------------------------------------------------------------------------------

    def _lead(self, compose: Callable[[int, Sequence[Member]], View]) -> View | None:
        """None: something is lacking, or somebody has come meanwhile."""
        with self._changed:
            while not all(one.aboard for one in self._followers.values()):
                self._check_open()
                self._changed.wait(_LOOK_S)
            self._check_open()
            followers = list(self._followers.values())
        members = sorted([self.me, *(one.member for one in followers)], key=lambda member: member.rank)
        number = 1 + max(self._number, self._over, *(one.view for one in followers))
        try:
            view = compose(number, members)
        except Stranded as error:
            self._wait_stranded(str(error), followers)
            return None
        self._begin(view, followers)
        tell([one.link for one in followers], view)
        with self._changed:
            lost = [one for one in followers if self._followers.get(one.member.rank) is not one]
        if lost:
            self.end(number, f"{lost[0].member.worker_id} was lost at its beginning")
        return view

    def _wait_stranded(self, reason: str, followers: Sequence[_Follower]) -> None:
        """Until somebody comes, or goes."""
        self._on_stranded(reason)
        tell([one.link for one in followers], Lacking(reason))
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._closing or set(self._followers.values()) != set(followers), _STRANDED_S
            )
            self._formed = came  # else there may be another group meanwhile

    def _begin(self, view: View, followers: Sequence[_Follower] = ()) -> None:
        with self._changed:
            self._view, self._rung, self._next = view, 0, None
            self._ended = view.number <= self._over
            for one in followers:
                one.aboard = False

    # --- following --------------------------------------------------------------------------------------------------

    def _follow(self) -> View | None:
        """None: the leader was lost."""
        leader = self._leader
        if leader is None:
            return None
        tell([leader], Aboard(self._number))
        with self._changed:
            while self._next is None and self._leader is leader:
                self._check_open()
                self._changed.wait(_LOOK_S)
            view = self._next
        if view is None:
            return None
        self._begin(view)
        if self._leader is not leader:
            self.end(view.number, "its leader was lost at its beginning")
        return view

    def _read_leader(self, found: Following) -> None:
        link = found.link
        try:
            while True:
                message = link.receive()
                match message:
                    case Beat():
                        pass
                    case Wake():
                        self._woken(message)
                    case Broken():
                        self.end(message.view, message.reason)
                    case Lacking():
                        self._on_stranded(message.reason)
                    case View():
                        with self._changed:
                            self._next = message
                            self._changed.notify_all()
                    case _:
                        raise ProtocolError(f"{type(message).__name__} is not a leader's to send")
        except (OSError, EOFError, ProtocolError) as error:
            reason = f"{found.leader.worker_id}, its leader, was lost: {error}"
        link.close()
        with self._changed:
            if self._leader is not link:
                return
            self._leader, self._leading = None, None
            self._changed.notify_all()
        self.end(self._number, reason)

    def _woken(self, wake: Wake) -> None:
        with self._changed:
            if self._view is None or self._view.number != wake.view or wake.turn <= self._rung:
                return
            self._rung = wake.turn
        self._on_wake()

    # --- finding one another ----------------------------------------------------------------------------------------

    def _find_group(self) -> None:
        """Returns with a leader to follow, or as the leader of all who can be expected."""
        began = time.monotonic()
        while True:
            gone = self._ask_everybody()
            with self._changed:
                if self._leader is not None:
                    return
                if self._complete(gone, began):
                    self._formed = True
                    return
                self._check_open()
                self._changed.wait(_LOOK_S)

    def _ask_everybody(self) -> set[int]:
        """Look for a leader. Returns the ranks whose last known life does not answer."""
        join = Join(self.me, self._number)
        before = self._view.members if self._view is not None else ()
        gone: set[int] = set()
        for member in self._acquaintances.known(before):
            reply = self._acquaintances.ask(member, join)
            if reply is None:
                gone.add(member.rank)
            elif isinstance(reply, Following):
                self._obey(reply)
                break
        return gone

    def _obey(self, found: Following) -> None:
        with self._changed:
            self._leader, self._leading, self._formed, self._next = found.link, found.leader, False, None
            dropped, self._followers = list(self._followers.values()), {}
        for one in dropped:  # they will find the same leader
            one.link.close()
        found.link.sock.settimeout(self._timeout_s)
        threading.Thread(target=self._read_leader, args=(found,), name="experts-leader", daemon=True).start()

    def _complete(self, gone: set[int], began: float) -> bool:
        """Under the lock: whether this rank leads those who are there."""
        present = {self.me.rank, *self._followers}
        if len(present) == self._size:
            return True
        if self._view is None:
            return False  # at the first start everybody is waited for
        expected = {member.rank for member in self._view.members} - gone
        return expected <= present or time.monotonic() - began > _REGROUP_S

    def _takes(self, join: Join) -> bool:
        """Under the lock."""
        known = self._followers.get(join.member.rank)
        if not 0 <= join.member.rank < self._size or join.member.rank == self.me.rank:
            return False
        if self._leader is not None or (known is not None and known.member.epoch > join.member.epoch):
            return False
        return self._formed or (-join.view, join.member.rank) > (-self._number, self.me.rank)

    # --- those who come ---------------------------------------------------------------------------------------------

    def serve(self, link: Link, join: Join) -> None:
        """A rank that looks for a leader, for as long as it stays. Raises OSError, ProtocolError."""
        member = join.member
        if member.fingerprint != self.me.fingerprint:
            raise ProtocolError(
                f"{member.worker_id} has another model or other settings of experts: it can't compute with this rank"
            )
        self._acquaintances.meet(member)
        follower = _Follower(link, member, join.view)
        with self._changed:
            taken = self._takes(join)
            earlier = self._followers.get(member.rank)
            if taken:
                self._followers[member.rank] = follower
            leader = self._leading
            self._changed.notify_all()
        if not taken:
            link.send(Elsewhere(leader))
            return
        if earlier is not None:
            earlier.link.close()
            self.end(self._number, f"{member.worker_id} has begun another life")
        reason = "it left"
        try:
            link.send(Joined())
            self._on_wake()  # the leader's next turn is for the newcomer
            self._read_follower(follower)
        except (OSError, EOFError, ProtocolError) as error:
            reason = str(error)
        self._lost(follower, reason)

    def _read_follower(self, follower: _Follower) -> None:
        while True:
            message = follower.link.receive()
            match message:
                case Beat():
                    pass
                case Wake():
                    self._woken(message)
                    with self._changed:
                        others = [link for link in self._links() if link is not follower.link]
                    tell(others, message)
                case Broken():
                    self.end(message.view, f"{follower.member.worker_id}: {message.reason}")
                case Aboard():
                    with self._changed:
                        follower.aboard, follower.view = True, message.view
                        self._changed.notify_all()
                case _:
                    raise ProtocolError(f"{type(message).__name__} is not a follower's to send")

    def _lost(self, follower: _Follower, reason: str) -> None:
        with self._changed:
            if self._followers.get(follower.member.rank) is not follower:
                return
            del self._followers[follower.member.rank]
            view = self._view
            self._changed.notify_all()
        if view is not None and follower.member in view.members:
            self.end(view.number, f"{follower.member.worker_id} was lost: {reason}")

    def _beat(self) -> None:
        while not self._closing:
            with self._changed:
                links = self._links()
            tell(links, Beat())
            time.sleep(self._heartbeat_s)

    def _links(self) -> list[Link]:
        """Under the lock: to the leader, or to all followers."""
        return [one.link for one in self._followers.values()] if self._leader is None else [self._leader]

    def _check_open(self) -> None:
        if self._closing:
            raise GroupClosed("this rank is about to stop")
