"""Ray itself: started here for one machine, or joined where a cluster runs already.

A local Ray is private: it listens on loopback only, with a token that lives in this process's environment, keeps its
files in a temporary directory of its own, and ends with this process, even when that one is killed.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.topology import Host, Inventory

logger = logging.getLogger(__name__)

_LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own switch for "this machine only": listeners bind loopback
    "RAY_prestart_worker_first_driver": "0",  # idle processes would fight for the cores while Ray starts
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
    "SPT_NOENV": "1",  # Ray's process titles must not overwrite the environment, by which we know our processes
    "RAY_task_events_report_interval_ms": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",  # on a busy machine the default gives up
}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a spare without a GPU may get one later
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
TEMP_PREFIX = "headrace-"
_LONGEST_TEMP = 40  # characters; Ray's unix sockets below it must stay under 107


class RayError(Exception):
    """Ray did not start or could not be joined."""


def machine() -> Inventory:
    """What this machine has, without asking Ray: its usable cores and its visible NVIDIA GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    gpus = len(devices)
    if devices and visible is not None:
        gpus = len([part for part in visible.split(",") if part.strip() not in ("", "-1", "NoDevFiles")])
    return Inventory((Host("local", "127.0.0.1", float(usable_cores()), float(gpus)),), local=True)


def usable_cores() -> int:
    """Cores this process may run on, a container's CPU quota included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2: no quota to know of
    return cores


class RayRuntime:
    """Our connection to Ray; for a local one, its processes and files too."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self.local = config.ray.address is None
        self.temp_dir: Path | None = None
        self._started = False

    def make_files(self) -> Path | None:
        """The directory that a local Ray will use. It exists before Ray does, so that its place can be noted."""
        if self.local and self.temp_dir is None:
            parent = tempfile.gettempdir()
            if len(parent) > _LONGEST_TEMP:
                parent = "/tmp"
            self.temp_dir = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
        return self.temp_dir

    def start(self, num_cpus: float, num_gpus: float) -> None:
        """Raises RayError. Call on the main thread: the kernel ties Ray's processes to the thread that starts them."""
        self._prepare_environment()
        import ray

        # Ray spends its start waiting for processes; Serve's modules load meanwhile.
        threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True).start()

        options: dict[str, Any] = {
            "namespace": f"headrace-{self._config.cluster}",
            "logging_level": "error",
            "log_to_driver": True,
        }
        if self.local:
            options |= {
                "address": "local",
                "num_cpus": max(1, int(num_cpus + 0.999)),
                "num_gpus": int(num_gpus),
                "include_dashboard": False,
                "object_store_memory": int(self._config.ray.object_store_memory),
                "_temp_dir": str(self.make_files()),
            }
        else:
            options["address"] = self._config.ray.address
        interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
            self._started = True
        except (RuntimeError, OSError, ValueError, ray.exceptions.RayError) as error:
            what = "start Ray" if self.local else f"join the Ray cluster at {self._config.ray.address}"
            raise RayError(f"could not {what}: {_first_line(error)}") from error
        finally:
            # ray.init puts its own handlers in place; ours stop everything in order.
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)

    def inventory(self) -> Inventory:
        """What the joined cluster has, as Ray counts it."""
        ray: Any = importlib.import_module("ray")
        hosts = [
            Host(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        return Inventory(tuple(hosts), local=self.local)

    def node_id(self) -> str:
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        return node

    def node_address(self) -> str:
        ray: Any = importlib.import_module("ray")
        address: str = ray.util.get_node_ip_address()
        return address

    def stop(self) -> None:
        """Idempotent. Ends a local Ray with all its processes; leaves a joined one as it was."""
        if self._started:
            import ray

            self._started = False
            ray.shutdown()
        self.remove_files()

    def remove_files(self) -> None:
        if self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)

    def _prepare_environment(self) -> None:
        settings = _ENVIRONMENT | (_LOCAL_ENVIRONMENT if self.local else {})
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        if self.local:
            # A token of our own, so that nothing is read from or written to the user's ~/.ray.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.pop("RAY_ADDRESS", None)
            _share_checkout()


def _share_checkout() -> None:
    """Let Ray's processes import our packages when we run from a checkout that is not installed."""
    root = Path(__file__).resolve().parent.parent
    if {"site-packages", "dist-packages"} & set(root.parts):
        return
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(root) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *paths])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
