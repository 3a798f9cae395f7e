"""By what the members of a view exchange tokens, and how they come together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.cuda import Cuda, CupyCuda
from workers.experts import futex
from workers.experts.exchange import Bound, Exchange, GroupBroken, Parcel, Shape
from workers.experts.gloo import GlooExchange, GlooStore
from workers.experts.membership import Stranded
from workers.experts.messages import ExchangeKind, Meeting, Member, View
from workers.experts.nccl import NcclExchange
from workers.experts.shm import Segment, ShmExchange

ExchangeSetting = Literal["auto", "shm", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class Hosted:
    """Kept by the leader for as long as its view lasts."""

    meeting: Meeting
    close: Callable[[], None]


class Host:
    """One rank's means of meeting others."""

    def __init__(
        self,
        setting: ExchangeSetting,
        address: str,
        device: torch.device,
        timeout_s: float,
        cuda: Cuda | None = None,
    ) -> None:
        """`address`: of this machine, for gloo. `timeout_s`: a member that does not come to a meeting."""
        self.setting, self.address, self.device, self.timeout_s = setting, address, device, timeout_s
        self.cuda = cuda or CupyCuda()

    def meeting(self, members: Sequence[Member], shape: Shape) -> Hosted:
        """Make one for these. Raises Stranded when they have no way in common."""
        kind = self._kind(members)
        if len(members) == 1:
            return Hosted(Meeting(kind), lambda: None)
        if kind == "shm":
            segment = Segment(len(members), shape)
            return Hosted(Meeting(kind, at=segment.path), segment.close)
        if kind == "gloo":
            store = GlooStore(self.address, self.timeout_s)
            return Hosted(Meeting(kind, at=store.at), store.close)
        return Hosted(Meeting(kind, unique_id=self.cuda.unique_id()), lambda: None)

    def _kind(self, members: Sequence[Member]) -> ExchangeKind:
        one_host = len({member.host_id for member in members}) == 1
        lack = futex.lacks()
        if self.setting == "shm" and (not one_host or lack is not None):
            raise Stranded(f"experts.exchange is shm, but {lack or 'the ranks are on several hosts'}")
        if self.setting != "auto":
            return self.setting
        if self.device.type == "cuda":
            return "gloo" if self.cuda.lacks(nccl=True) else "nccl"
        return "shm" if one_host and lack is None else "gloo"


def open_exchange(view: View, rank: int, shape: Shape, host: Host) -> Exchange:
    """Raises OSError, ValueError, GroupBroken."""
    size, me = len(view.members), view.ranks.index(rank)
    meeting = view.meeting
    if size == 1:
        return Alone()
    if meeting.kind == "shm":
        return ShmExchange(meeting.at, size, me, shape)
    if meeting.kind == "gloo":
        return GlooExchange(meeting.at, host.address, size, me, shape, host.timeout_s)
    return NcclExchange(host.cuda, host.device, meeting.unique_id, size, me, shape, host.timeout_s)


class Alone:
    """The exchange of a group with one rank left."""

    size, me = 1, 0

    def __init__(self) -> None:
        self._aborted = False

    def headers(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._aborted:
            raise GroupBroken("the exchange was aborted")
        return mine[None]

    def dispatch(self, x: Tensor, bound: Sequence[Bound]) -> None:
        pass

    def receive(self) -> list[Parcel | None]:
        return [None]

    def room(self, counts: Sequence[int]) -> list[Tensor | None]:
        return [None]

    def combine(self, outputs: Sequence[Tensor | None]) -> None:
        pass

    def results(self, counts: Sequence[int]) -> list[Tensor | None]:
        return [None]

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._aborted = True
