"""Where clients find a cluster, and whether it answers there."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from dataclasses import dataclass

from router.config import RouterConfig

WILDCARDS = ("0.0.0.0", "::", "")
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    grpc: str  # host:port, empty when off
    model: str  # the name clients use


def address_of(config: RouterConfig, model: str, anywhere: str = "127.0.0.1") -> Address:
    """`anywhere` is what stands for a listener on every address."""

    def reachable(host: str) -> str:
        host = anywhere if host in WILDCARDS else host
        return f"[{host}]" if ":" in host else host

    return Address(
        url=f"http://{reachable(config.http.host)}:{config.http.port}",
        grpc=f"{reachable(config.grpc.host)}:{config.grpc.port}" if config.grpc.enabled else "",
        model=model,
    )


def ask_ready(address: Address, api_keys: Sequence[str] = ()) -> str:
    """`ready`, or why not."""
    connection = http.client.HTTPConnection(address.url.removeprefix("http://"), timeout=_TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
        connection.request("GET", "/ready", headers=headers)
        answer = connection.getresponse()
        body = answer.read(200).decode(errors="replace")
        return "ready" if answer.status == 200 else f"{answer.status} {body}"
    except (OSError, http.client.HTTPException) as error:
        return f"no answer from {address.url}: {error}"
    finally:
        connection.close()
