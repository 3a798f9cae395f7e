"""What runs inside Ray's processes: a thin shell around a worker. Ray carries commands here, never tokens."""

from __future__ import annotations

import importlib
import logging
import os
import time
from typing import Any, Protocol

import msgspec

from cluster.logs import set_up_logging
from workers.config import WorkerConfig
from workers.environment import limit_libraries
from workers.garbage import spare_steps
from workers.protocol.messages import WorkerInfo

logger = logging.getLogger(__name__)

WORKER_CLASS = "workers.worker:open_worker"


class WorkerLike(Protocol):
    """What the actor asks of a worker; tests put a fake in its place."""

    def start(self) -> WorkerInfo: ...

    def wait(self) -> None: ...

    def drain(self, timeout_s: float) -> bool: ...

    def stop(self) -> None: ...


class WorkerActor:
    """One process for one life of a worker. Idle until `start`, so that a spare can wait with its libraries loaded.

    Threaded (max_concurrency > 1): `run` blocks for the whole life while `stop` and `pid` still answer. When the
    process dies, the reference that `run` returned fails, and that is how the supervisor hears of it.
    """

    def __init__(self, num_threads: int, log_level: str, worker_class: str = WORKER_CLASS) -> None:
        limit_libraries(num_threads)
        self._log_level = log_level
        self._worker_class = worker_class
        self._worker: WorkerLike | None = None
        set_up_logging(log_level, "spare")

    def warm(self) -> int:
        """Load the libraries, and nothing of a model. Answers the process id."""
        self._load_class()
        return os.getpid()

    def start(self, config_json: str, gpus: list[str] | None = None) -> dict[str, Any]:
        """Begin the life. Answers the worker's WorkerInfo as a dict, with the GPU ids it got as `gpus`.

        `gpus` are for a spare that takes over the bundle of a dead worker: Ray hid all GPUs from the spare.
        """
        config = WorkerConfig.model_validate_json(config_json)
        set_up_logging(self._log_level, config.worker_id)
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        began = time.monotonic()
        worker_class = self._load_class()
        loaded = time.monotonic()
        self._worker = worker_class(_on_this_node(config))
        info: dict[str, Any] = msgspec.to_builtins(self._worker.start(), builtin_types=(bytes,))
        spare_steps()
        logger.debug(
            "libraries loaded in %.1f s, worker started in %.1f s", loaded - began, time.monotonic() - loaded
        )
        return info | {"gpus": gpus or _gpu_ids()}

    def run(self) -> None:
        """Block until the worker has ended. Raises what ended it when that was not `stop`."""
        if self._worker is None:
            raise RuntimeError("run() before start()")
        self._worker.wait()

    def stop(self) -> None:
        """End the worker in order: it says good-bye to its peers and takes its registration back."""
        if self._worker is not None:
            self._worker.stop()

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait until what is here has ended, then end. False: the time was over before."""
        if self._worker is None:
            return True
        done = self._worker.drain(timeout_s)
        self._worker.stop()
        return done

    def pid(self) -> int:
        return os.getpid()

    def _load_class(self) -> Any:
        module, _, name = self._worker_class.partition(":")
        return getattr(importlib.import_module(module), name)


def _on_this_node(config: WorkerConfig) -> WorkerConfig:
    """Put the address of the node we run on in the place of `node`."""
    if "node" not in (config.host, config.transfer.host):
        return config
    ray: Any = importlib.import_module("ray")
    address: str = ray.util.get_node_ip_address()
    transfer = config.transfer
    if transfer.host == "node":
        transfer = transfer.model_copy(update={"host": address})
    host = address if config.host == "node" else config.host
    return config.model_copy(update={"host": host, "transfer": transfer})


def _gpu_ids() -> list[str]:
    import ray

    ids: list[str] = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return ids


# --- the driver's side of it -----------------------------------------------------------------------------------------


def remote_worker(num_cpus: float, num_gpus: float) -> Any:
    """WorkerActor as a Ray actor class. It never restarts by itself: the supervisor decides, with a new epoch."""
    ray: Any = importlib.import_module("ray")
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_concurrency": 8}
    return ray.remote(**options)(WorkerActor)


def death_reason(error: BaseException) -> str:
    """Why a life ended, in one line."""
    ray: Any = importlib.import_module("ray")

    if isinstance(error, ray.exceptions.RayTaskError):
        cause: BaseException | None = error.cause
        parts: list[str] = []
        while cause is not None:
            parts.append(f"{type(cause).__name__}: {cause}".strip().splitlines()[0])
            cause = cause.__cause__
        return ", because ".join(parts)
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died"
    return str(error).strip().splitlines()[0]
