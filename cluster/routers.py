"""The router replicas in Ray Serve, as the driver starts and stops them."""

from __future__ import annotations

import importlib
import logging
import threading
import time
from typing import Any

from cluster.router_replica import ROUTER_CLASS, RouterReplica, RouterSettings

_ASK_EVERY_S = 2.0


class Routers:
    """One Serve application. Starting goes on in a thread, since workers start at the same time."""

    def __init__(
        self, cluster: str, replicas: int, owns_serve: bool, router_class: str = ROUTER_CLASS
    ) -> None:
        self._name = f"headrace-{cluster}"
        self._replicas = replicas
        self._owns_serve = owns_serve  # a Serve in a Ray that we joined may have other users
        self._router_class = router_class
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._ask_after = 0.0

    def start(self, settings: RouterSettings) -> None:
        self._thread = threading.Thread(
            target=self._deploy, args=(settings,), name="serve-start", daemon=True
        )
        self._thread.start()

    def _deploy(self, settings: RouterSettings) -> None:
        try:
            serve: Any = importlib.import_module("ray.serve")
            from ray.serve.schema import LoggingConfig

            logging.getLogger("ray.serve").setLevel(logging.WARNING)

            quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
            serve.start(proxy_location="Disabled", logging_config=quiet)
            deployment = serve.deployment(
                name="router",
                num_replicas=self._replicas,
                ray_actor_options={"num_cpus": 0},
                health_check_period_s=1.0,
                # A router whose host is starved for seconds still holds its streams: replacing it would end them.
                health_check_timeout_s=15.0,
                graceful_shutdown_wait_loop_s=0.1,
                graceful_shutdown_timeout_s=10.0,
                logging_config=quiet,
            )(RouterReplica)
            application = deployment.bind(settings.model_dump_json(), self._router_class)
            # Readiness is judged by the router's own /ready, so nobody waits for Serve's opinion.
            target = serve.RunTarget(application, name=self._name, route_prefix=None)
            serve.run_many([target], wait_for_applications_running=False)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._failure = error

    def failure(self) -> str | None:
        """Why the replicas can't come up, as far as is known now. Asks Serve at most every two seconds."""
        if self._failure is not None:
            return str(self._failure) or type(self._failure).__name__
        if self._thread is None or self._thread.is_alive() or time.monotonic() < self._ask_after:
            return None
        self._ask_after = time.monotonic() + _ASK_EVERY_S
        serve: Any = importlib.import_module("ray.serve")
        application = serve.status().applications.get(self._name)
        if application is None or application.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
            return None
        messages = [deployment.message for deployment in application.deployments.values()]
        reason: str = next((message for message in messages if message), application.message)
        return reason

    def node_address(self, timeout_s: float) -> str:
        """Address of a node that has a replica. Raises RuntimeError when there is none in time."""
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None:
            raise RuntimeError(str(self._failure)) from self._failure
        serve: Any = importlib.import_module("ray.serve")
        try:
            handle = serve.get_app_handle(self._name)
            address: str = handle.node_address.remote().result(timeout_s=timeout_s)
        except TimeoutError as error:
            raise RuntimeError(f"no replica answers within {timeout_s:g} s") from error
        return address

    def stop(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        if self._failure is not None:
            return
        serve: Any = importlib.import_module("ray.serve")
        if self._owns_serve:
            serve.shutdown()
        else:
            serve.delete(self._name)
