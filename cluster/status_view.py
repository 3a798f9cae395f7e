"""`headrace status`: what a router says of the cluster, as a table."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TIMEOUT_S = 5.0
_WIDE = ("address", "pid", "epoch")
_STATES = {"up": "green", "leaving": "yellow"}


class StatusError(Exception):
    """No status to be had."""


def fetch_status(url: str, api_key: str | None = None) -> dict[str, Any]:
    """GET {url}/cluster. Raises StatusError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # as `headrace chat`: never by a proxy
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/cluster", headers=headers)
        with direct.open(request, timeout=_TIMEOUT_S) as answer:
            status = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise StatusError(f"{url} wants an API key: pass --api-key or set HEADRACE_API_KEY") from error
        raise StatusError(f"{url}/cluster answered {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StatusError(f"no cluster answers at {url}: {reason}") from error
    if not isinstance(status, dict):
        raise StatusError(f"{url}/cluster is not a Headrace router")
    return status


def render_status(status: dict[str, Any], url: str, wide: bool = True) -> RenderableType:
    """One line for the cluster, one row for each worker; `wide` adds where each worker is.

    Fields that a router does not know are shown as a dash.
    """
    model = status.get("model") or {}
    name = model.get("name", "-") if isinstance(model, dict) else str(model)
    redis = str(status.get("redis", "-"))
    approximate = (status.get("index") or {}).get("approximate", False)
    head = Text.assemble(
        (name, "bold"),
        f"  {url}  in flight {status.get('in_flight', '-')}  queue {status.get('queue', '-')}  redis ",
        (redis, "green" if redis == "ok" else "red"),
        ("  index approximate", "yellow") if approximate else "",
    )
    if planned := _planned(status.get("planner")):
        head = Text.assemble(head, "\n", planned)
    for group in status.get("experts") or []:
        head = Text.assemble(head, "\n", _experts(group))
    workers = status.get("workers") or []
    if not workers:
        return Group(head, Text("no workers are registered", "yellow"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("worker", "state", "device", *(_WIDE if wide else ())):
        table.add_column(title, no_wrap=True)
    for title in ("run", "wait", "rsv", "send", "KV used", "cached", "hits", "tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for worker in workers:
        table.add_row(*_row(worker, wide))
    ways = _ways(workers)
    return Group(head, table, Text(), ways) if ways.row_count else Group(head, table)


def _experts(group: dict[str, Any]) -> Text:
    """One line on the placement of a group's experts; `headrace experts` says more."""
    told = f"experts of {group.get('group', '-')}: placement {group.get('version', '-')}, {group.get('phase', '-')}"
    return Text(f"{told}: {group.get('text', '-')}", "red" if group.get("trouble") else "dim")


def _planned(planner: dict[str, Any] | None) -> Text | None:
    """One line of what the planner has found; a change that it only suggests stands out."""
    if not planner:
        return None
    changes = planner.get("sizes") != planner.get("present")
    word = "planner" if planner.get("apply") or not changes else "planner suggests"
    return Text(f"{word}: {planner.get('text', '-')}", "yellow" if changes else "dim")


def _ways(workers: list[dict[str, Any]]) -> Table:
    """By which road KV blocks go from whom to whom, and why not by a better one."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("KV blocks from", "to", "road", "channels"):
        table.add_column(title, no_wrap=True)
    for title in ("sent", "rate"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("passed over")
    for worker in workers:
        for peer, way in sorted((worker.get("peers") or {}).items()):
            rate = way.get("bytes_per_s") or 0
            table.add_row(
                str(worker.get("worker_id", "-")),
                peer,
                way.get("road") or "opening",
                str(way.get("channels", "-")),
                f"{way.get('sent_bytes', 0) / 1e6:,.0f} MB",
                f"{rate / 1e9:.2f} GB/s" if rate else "-",
                "; ".join(way.get("passed_over") or ()),
            )
    return table


def _row(worker: dict[str, Any], wide: bool) -> list[Text | str]:
    blocks = worker.get("blocks") or {}
    state = str(worker.get("state", "-"))
    rate = worker.get("prefix_hit_rate")

    def cell(name: str) -> str:
        return str(worker.get(name, "-"))

    return [
        cell("worker_id"),
        Text(state, _STATES.get(state, "red")),
        cell("device"),
        *([cell(name) for name in _WIDE] if wide else []),
        cell("running"),
        cell("waiting"),
        cell("reserved"),
        cell("sending"),
        f"{blocks.get('used', '-')}/{blocks.get('total', '-')}",
        str(blocks.get("cached", "-")),
        "-" if rate is None else f"{rate:.0%}",
        cell("output_tokens" if worker.get("role") != "prefill" else "prompt_tokens"),
    ]
