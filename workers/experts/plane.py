"""Everything by which a worker is a rank of an expert-parallel group, put together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.config import ExpertsConfig
from workers.experts.acquaintances import Acquaintances
from workers.experts.counts import Counted
from workers.experts.directory import Directory
from workers.experts.door import Door
from workers.experts.group import ExpertGroup, ExpertModel
from workers.experts.link import Link
from workers.experts.meeting import Host
from workers.experts.membership import Membership
from workers.experts.messages import Fetch, Member
from workers.experts.peers import PeerSource, Portable, send_weights
from workers.models.spec import MoeSpec
from workers.protocol.messages import WorkerInfo
from workers.transfer.shm import host_id


@dataclass(frozen=True, slots=True)
class Place:
    """Of this rank."""

    group: str
    rank: int
    size: int
    worker_id: str
    epoch: int


class SpreadExperts(Portable, Protocol):
    """The experts of a loaded model."""

    def idle(self) -> None:
        """Take part in a step without tokens of one's own. Raises GroupBroken."""

    def take_counts(self) -> Counted:
        """Since the last time. From any one thread."""


class ExpertPlane:
    """Made before the model is loaded, equipped by whoever loads it, started when the worker can be reached."""

    def __init__(
        self,
        place: Place,
        config: ExpertsConfig,
        directory: Directory,
        *,
        host: str,
        secret: bytes,
        heartbeat_s: float,
        timeout_s: float,
    ) -> None:
        """`host`: address to bind, which other ranks can reach. Raises OSError."""
        self.place, self.config = place, config
        self._directory, self._host, self._secret = directory, host, secret
        self._heartbeat_s, self._timeout_s = heartbeat_s, timeout_s
        self._door = Door(host, secret, timeout_s)
        self._membership: Membership | None = None
        self._wake = threading.Event()
        self.group: ExpertGroup
        self.on_wake: Callable[[], None] = lambda: None

    def slots(self, moe: MoeSpec | None) -> int:
        """Experts of a layer that this rank has memory for. Raises ValueError for a model without experts."""
        size = self.place.size
        if moe is None:
            raise ValueError(f"expert_parallel is {size}, but this model has no experts; set it to 1")
        if self.config.slots is not None:
            return min(self.config.slots, moe.num_experts)
        return -(-moe.num_experts // max(size - 1, 1))  # one rank may be lost

    def equip(self, model: ExpertModel, slots: int, own: SpreadExperts, device: torch.device) -> ExpertGroup:
        """By the backend, which has loaded the rest of the model. Raises ValueError."""
        place, config = self.place, self.config
        peers = None
        if config.source == "peers":
            peers = PeerSource(own, self._secret, place.worker_id, self._timeout_s)
        host = Host(config.exchange, self._host, device, self._timeout_s)
        self.group = ExpertGroup(
            place.rank,
            place.size,
            slots,
            model,
            peers or own,
            host,
            staging=config.staging,
            on_wake=lambda: self.on_wake(),
        )
        if peers is not None:
            peers.holders = self.group.holders
        self._own = own
        return self.group

    def idle(self) -> None:
        """A step without tokens of one's own. Raises GroupBroken."""
        self._own.idle()

    def take_counts(self) -> Counted:
        return self._own.take_counts()

    def start(self, info: WorkerInfo) -> None:
        """Enter the group; `begin` waits until it is complete."""
        place = self.place
        # Ranks must agree on what fits, too: each judges placements by itself.
        alike = f"{info.layout.model_fingerprint}:{self.group.capacity}:{place.size}"
        me = Member(place.rank, place.worker_id, place.epoch, self._door.address, host_id(), alike)
        acquaintances = Acquaintances(me, self._directory, self._secret)
        self._membership = self.group.views = Membership(
            me,
            place.size,
            acquaintances,
            heartbeat_s=self._heartbeat_s,
            timeout_s=self._timeout_s,
            on_broken=lambda reason: self.group.abort(),
            on_wake=lambda: self.on_wake(),
            on_stranded=self.group.lacking,
        )
        self._door.open(info, self._membership.serve, self._answer)
        self._membership.start()
        self._directory.enter(me)

    def close(self) -> None:
        """The others see this rank leave; whoever waits for them is let go. Idempotent."""
        if self._membership is not None:
            self._membership.close()
        self._door.close()
        if hasattr(self, "group"):
            self.group.close()

    def _answer(self, link: Link, fetch: Fetch) -> None:
        send_weights(link, self._own, self.group.holdings.weights(fetch.layer, fetch.expert))
