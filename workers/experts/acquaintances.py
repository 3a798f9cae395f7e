"""The other ranks of a group: where they are, and what they answer to whoever looks for a leader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workers.experts.directory import Directory
from workers.experts.link import Link, call
from workers.experts.messages import Elsewhere, Join, Joined, Member
from workers.protocol.frames import ProtocolError

_ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class Following:
    """Taken by a leader."""

    link: Link
    leader: Member


class Acquaintances:
    def __init__(self, me: Member, directory: Directory, secret: bytes) -> None:
        self._me, self._directory, self._secret = me, directory, secret
        self._met: dict[int, Member] = {}

    def meet(self, member: Member) -> None:
        """It has asked us: Redis need not be there to know it."""
        self._met[member.rank] = member

    def known(self, before: Iterable[Member] = ()) -> list[Member]:
        """By rank, the latest life that anybody has told of; `before`: members of an earlier view."""
        found: dict[int, Member] = {}
        for member in (*before, *self._directory.read(), *self._met.values()):
            if member.rank != self._me.rank and member.epoch >= found.get(member.rank, member).epoch:
                found[member.rank] = member
        return [found[rank] for rank in sorted(found)]

    def ask(self, member: Member, join: Join) -> Following | Elsewhere | None:
        """Follow it, or whom it follows. None: it does not answer."""
        reply = self._ask(member, join)
        if isinstance(reply, Elsewhere) and reply.leader is not None and reply.leader.rank != self._me.rank:
            return self._ask(reply.leader, join) or reply
        return reply

    def _ask(self, member: Member, join: Join) -> Following | Elsewhere | None:
        try:
            link = call(member.address, self._secret, self._me.worker_id, _ANSWER_S)
        except (OSError, ProtocolError):
            return None
        try:
            link.send(join)
            reply = link.receive()
        except (OSError, ProtocolError):
            link.close()
            return None
        if isinstance(reply, Joined):
            return Following(link, member)
        link.close()
        return reply if isinstance(reply, Elsewhere) else None
