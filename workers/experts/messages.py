"""What the ranks of a group say to each other, besides tokens: frames of workers/protocol, after its handshake.

A connection is either a follower's to its leader (`Join`), for as long as both live, or somebody's who wants weights
(`Fetch`).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from workers.protocol.experts import Placement
from workers.protocol.frames import Codec
from workers.protocol.messages import Challenge, Hello, Refused, Welcome

ExchangeKind = Literal["shm", "gloo", "nccl"]


class Member(Struct, frozen=True):
    """One life of one rank."""

    rank: int
    worker_id: str
    epoch: int  # of the worker's life
    address: str  # host:port of its listener
    host_id: str  # the same: they can share memory
    fingerprint: str  # of the model and of what ranks must agree on: others don't mix


class Meeting(Struct, frozen=True):
    """Where the members of a view exchange tokens."""

    kind: ExchangeKind
    at: str = ""  # shm: a path; gloo: "host port"
    unique_id: bytes = b""  # nccl


class View(Struct, frozen=True, tag="view"):
    """Who computes together from now on, with which experts where."""

    number: int  # grows
    members: tuple[Member, ...]  # by rank
    placement: Placement  # holds for the first step; nothing is on ranks that are no members
    wanted: (
        Placement  # what was asked for last, when all ranks were there: `placement` comes as near as it can
    )
    meeting: Meeting

    @property
    def ranks(self) -> list[int]:
        return [member.rank for member in self.members]


class Join(Struct, frozen=True, tag="join"):
    member: Member
    view: int  # the last it was in; 0: none in this life


class Joined(Struct, frozen=True, tag="joined"):
    """You are a follower; `View` will come."""


class Elsewhere(Struct, frozen=True, tag="else"):
    """Not here: ask the leader, or, when there is none yet, wait to be asked."""

    leader: Member | None = None


class Beat(Struct, frozen=True, tag="beat"):
    """Alive. Sent by both ends."""


class Wake(Struct, frozen=True, tag="wake"):
    """Somebody has work: everybody takes part in this turn. Passed on by the leader."""

    view: int
    turn: int


class Broken(Struct, frozen=True, tag="broken"):
    """This view has ended."""

    view: int
    reason: str


class Lacking(Struct, frozen=True, tag="lacking"):
    """There will be no view until somebody has come: those who are there can't hold all experts."""

    reason: str


class Aboard(Struct, frozen=True, tag="aboard"):
    """The follower is in no step, and waits for the view after this one."""

    view: int


class Fetch(Struct, frozen=True, tag="fetch"):
    """The weights of an expert, please. Answered by `Weights`, again and again on one connection."""

    layer: int  # among those with experts
    expert: int


class Weights(Struct, frozen=True, tag="weights"):
    """As many bytes follow. 0: it is not here."""

    num_bytes: int


RankMessage = (
    Challenge
    | Hello
    | Welcome
    | Refused
    | View
    | Join
    | Joined
    | Elsewhere
    | Beat
    | Wake
    | Broken
    | Lacking
    | Aboard
    | Fetch
    | Weights
)
between_ranks: Codec[RankMessage] = Codec(RankMessage)
