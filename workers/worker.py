"""The worker process: one model replica with its servers. Started by an actor of cluster/, or by hand:

python -m workers config.json               (a WorkerConfig as JSON; SIGTERM stops it)
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

from workers.config import WorkerConfig
from workers.engine.backend import Runner, choose_device
from workers.engine.engine import Engine
from workers.experts.board import RankBoard
from workers.experts.plane import ExpertPlane, Place
from workers.experts.redis_directory import RedisDirectory
from workers.metrics import WorkerMetrics
from workers.models.catalog import prepare_model
from workers.models.sharding import rank_layout
from workers.parallel.follower import Follower
from workers.parallel.process_group import own_device
from workers.parallel.team import Team
from workers.protocol.messages import StatusReply, StatusRequest, WorkerInfo
from workers.protocol.tiers import Removed, Stored
from workers.publisher import Publisher
from workers.serving import Serving
from workers.tiers.tiers import open_tiers
from workers.token_server import TokenServer
from workers.transfer.block_memory import BlockMemory, block_memory
from workers.transfer.receiver import Receiver

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.1
_MEET_POLL_S = 0.02


class Worker:
    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._stopped = threading.Event()
        self._stopping = False
        self._publisher: Publisher | None = None
        self._receiver: Receiver | None = None
        self._experts: ExpertPlane | None = None
        self._board: RankBoard | None = None
        self._team: Team | None = None

    def start(self) -> WorkerInfo:
        """Load the model, open the ports, register. Raises ModelError, ValueError, OSError."""
        config = self.config
        secret = config.secret.encode()
        self._server = TokenServer(
            host=config.host,
            port=config.port,
            secret=secret,
            heartbeat_s=config.heartbeat_s,
            timeout_s=config.timeout_s,
            status=self.status,
        )
        address = self._server.bind()
        # Whoever sends most of its blocks keeps them where receivers on this host can read them in place.
        share = config.role == "prefill" and not {"shm", "cuda_ipc"}.isdisjoint(config.transfer.channels)
        self._experts = _expert_plane(config)
        self._team = _team(config)
        self.engine = Engine(
            config.engine,
            prepare_model(str(config.model_path)),
            share_kv=share,
            experts=self._experts,
            team=self._team,
        )
        memories = self._memories()
        self._check_tiers(len(memories))
        self.engine.attach(
            open_tiers(
                config.engine,
                self.engine.layout,
                self.engine.hash_root,
                memories,
                config.worker_id,
                pinned=self.engine.device.type == "cuda",
            )
        )
        self._metrics = WorkerMetrics(config.worker_id, config.role, config.served_name)
        self.serving = Serving(
            config,
            self.engine,
            memories,
            self._metrics,
            publish=self._publish,
            on_room=self._server.broadcast_load,
        )
        self._metrics.watch(self.serving.load, self.engine.num_blocks)
        if self.engine.tiers is not None:
            self._metrics.watch_tiers(self.engine.tiers.stats, self.engine.layout.block_bytes)
        self._metrics.engine(self.engine.runner.kernels, self.engine.runner.weights, self.engine.layout.dtype)
        if self.engine.runner.captured is not None:
            self._metrics.graphs(self.engine.runner.captured)
        self._receiver = Receiver(
            self.serving.tickets,
            memories,
            self.engine.layout,
            config.transfer,
            secret=secret,
            on_fetch=self.serving.handoffs.send_prefix,
        )
        self.serving.tickets.endpoints = self._receiver.endpoints
        self.serving.tickets.ranks = len(memories)
        self.info = self._describe(address)
        self._receiver.start(self.info)
        if config.redis_url is not None:
            self._publisher = Publisher(
                self.info,
                config.redis_url,
                config.cluster,
                lease_s=config.timeout_s,
                snapshot=self._snapshot,
            )
        if self._experts is not None:
            self._join_group(self._experts)
        self.serving.start()
        if self._experts is not None:
            self._await_group(self._experts)
        self._server.start(self.serving, self.info)
        if self._publisher is not None:
            self._publisher.start()
        logger.info("%s:%d serves %s on %s", config.worker_id, config.epoch, config.served_name, address)
        return self.info

    def wait(self) -> None:
        """Until `stop`. Raises what ended the engine, if it died."""
        while not self._stopped.wait(0.2):
            if self.serving.failure is not None:
                raise RuntimeError("the engine died") from self.serving.failure
            if self._team is not None and self._team.lost is not None and not self._stopping:
                raise RuntimeError(f"a rank was lost: {self._team.lost}")
            if self._publisher is not None and self._publisher.superseded:
                raise RuntimeError(f"a later life of {self.config.worker_id} has taken its place")

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, and wait until nothing is left of what is here. False: the time was over before."""
        self.serving.drain()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.serving.num_requests() and not len(self.serving.tickets) + len(self.serving.handoffs):
                # The last tokens are still being written to routers.
                time.sleep(min(self.config.heartbeat_s, 1.0))
                return True
            time.sleep(_DRAIN_POLL_S)
        return False

    def stop(self) -> None:
        """Every connection is closed, every thread ended, the registration taken back."""
        self._stopping = True
        self.serving.drain()
        if self._publisher is not None:
            self._publisher.close()
        self._server.stop()
        if self._board is not None:
            self._board.close()
        if self._experts is not None:
            self._experts.close()
        self.serving.stop()
        if self._receiver is not None:
            self._receiver.stop()
        self.engine.close()
        if self._team is not None:
            self._team.close()
        self._stopped.set()

    def status(self, request: StatusRequest) -> StatusReply:
        with self.engine.lock:
            return StatusReply(
                query_id=request.query_id,
                load=self.serving.load(),
                referenced_blocks=self.engine.pool.num_referenced,
                leases=len(self.serving.tickets) + len(self.serving.handoffs),
                requests=self.serving.num_requests(),
                hashes=list({h: None for h, _, _ in self.engine.cached()}) if request.want_hashes else [],
                metrics=self._metrics.text() if request.want_metrics else b"",
            )

    def _memories(self) -> list[BlockMemory]:
        """The KV cache of each rank."""
        layout, runner, team = self.engine.layout, self.engine.runner, self._team
        if team is None:
            return [block_memory(runner.kv_cache, layout, runner.shared)]
        heads = rank_layout(layout, team.group.shard).num_kv_heads
        own = block_memory(runner.kv_cache, layout, runner.shared, heads)
        return [own, *team.memories(layout, runner.kv_cache)]

    def _check_tiers(self, ranks: int) -> None:
        """Raises ValueError for tiers that would hold a KV head more than once."""
        heads = self.engine.layout.num_kv_heads
        if ranks > heads and self.config.engine.host_cache_memory:
            raise ValueError(
                f"engine.host_cache_memory cannot be had with {ranks} tensor-parallel ranks for {heads} KV heads, of which "
                "several hold the same one; set it to 0"
            )

    def _join_group(self, experts: ExpertPlane) -> None:
        experts.on_wake = self.serving.wake
        experts.group.on_lacking, experts.group.on_whole = self.serving.strand, self.serving.unstrand
        self._metrics.watch_experts(lambda: experts.group.status)
        experts.start(self.info)
        config = self.config
        assert config.redis_url is not None, "the configuration has seen to it"
        node, beat_s = socket.gethostname(), config.heartbeat_s
        self._board = RankBoard(experts, config.role, config.redis_url, config.cluster, node, beat_s)

    def _await_group(self, experts: ExpertPlane) -> None:
        """Until all ranks have met: nobody is told of this one before."""
        while experts.group.status.view == 0:
            if self.serving.failure is not None:
                raise RuntimeError("the engine died") from self.serving.failure
            time.sleep(_MEET_POLL_S)
        assert self._board is not None, "the group was joined"
        self._board.start()

    def _describe(self, address: str) -> WorkerInfo:
        engine = self.engine
        return WorkerInfo(
            worker_id=self.config.worker_id,
            epoch=self.config.epoch,
            role=self.config.role,
            address=address,
            model=self.config.served_name,
            layout=engine.layout,
            hash_root=engine.hash_root,
            num_blocks=engine.num_blocks,
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            vocab_size=engine.vocab_size,
            device=_device(engine.runner),
            pid=os.getpid(),
            endpoints=self._receiver.endpoints if self._receiver is not None else [],
            ranks=1 if self._team is None else self._team.size,
        )

    def _publish(self, stored: list[Stored], removed: list[Removed]) -> None:
        if self._publisher is not None:
            self._publisher.publish(stored, removed)

    def _snapshot(self) -> list[Stored]:
        """What the caches hold now. What has changed before is published first: see Publisher."""
        with self.engine.lock:
            self.serving.publish_cache()
            return self.engine.cached()


def _device(runner: Runner) -> str:
    """For people: which one, what computes there, and how many sizes of steps are CUDA graphs."""
    graphs = "" if runner.captured is None else f", {len(runner.captured.graphs)} graphs"
    return f"{runner.device} ({runner.kernels}{graphs})"


def open_worker(config: WorkerConfig) -> Worker | Follower:
    """Whatever this process is in its worker: all of it or its rank 0, or another rank."""
    rank = config.tensor_rank
    return Worker(config) if rank is None or rank.rank == 0 else Follower(config)


def _team(config: WorkerConfig) -> Team | None:
    """None: this process has the whole model."""
    if config.tensor_rank is None:
        return None
    return Team(config, own_device(choose_device(config.engine.device), config.tensor_rank.rank))


def _expert_plane(config: WorkerConfig) -> ExpertPlane | None:
    """None: all experts are here, if there are any."""
    rank = config.expert_rank
    if rank is None:
        return None
    assert config.redis_url is not None, "the configuration has seen to it"
    return ExpertPlane(
        Place(rank.group, rank.rank, rank.size, config.worker_id, config.epoch),
        config.experts,
        RedisDirectory(config.redis_url, config.cluster, rank.group),
        host=config.transfer.host,
        secret=config.secret.encode(),
        heartbeat_s=config.heartbeat_s,
        timeout_s=config.timeout_s,
    )
