"""`headrace explain`: why a request went where it went, as tables."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TIMEOUT_S = 5.0
# Each replica knows its own requests, and the kernel deals connections out among those of a node.
_TRIES = 24
_STAGES = ("queue", "choose", "reserve", "prefill_queue", "prefill", "transfer", "first_token")
_PARTS = ("prefill_queue", "prefill", "transfer")  # of first_token
_BAD = {"cancelled": "yellow", "running": "cyan", "waiting": "cyan", "finished": "green", "stop": "green"}


class ExplainError(Exception):
    """Nothing to explain."""


def fetch_explanation(url: str, request_id: str, api_key: str | None = None) -> dict[str, Any]:
    """GET {url}/cluster/requests/{request_id}, from whichever replica knows it. Raises ExplainError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    path = f"{url.rstrip('/')}/cluster/requests/{urllib.parse.quote(request_id, safe='')}"
    unknown = ""
    for _ in range(_TRIES):
        try:
            with direct.open(urllib.request.Request(path, headers=headers), timeout=_TIMEOUT_S) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise ExplainError(f"{path} answered {error.code}: {_message(error)}") from error
            unknown = _message(error)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ExplainError(f"no cluster answers at {url}: {getattr(error, 'reason', error)}") from error
        else:
            if not isinstance(found, dict) or "requests" not in found:
                raise ExplainError(f"{url} is not a Headrace router")
            return found
    raise ExplainError(unknown)


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def render_explanation(found: dict[str, Any]) -> RenderableType:
    """For each sequence: its placements, the candidates of each with every term of the cost, and what took how long."""
    parts: list[RenderableType] = []
    for request in found["requests"]:
        parts.append(_head(request, found.get("router_id", "-")))
        for number, placement in enumerate(request["placements"], 1):
            parts += [Text(), _placement_head(number, placement), _candidates(placement), _stages(placement)]
        parts.append(Text())
    return Group(*parts[:-1])


def _head(request: dict[str, Any], router_id: str) -> Text:
    first = request.get("first_token_s")
    text = Text.assemble(
        (request["request_id"], "bold"),
        f"  router {router_id}  policy {request['policy']}  prompt {request['prompt_tokens']} tokens"
        f"  first token {'-' if first is None else f'{first * 1e3:.1f} ms'}  ",
        (request["outcome"], _BAD.get(request["outcome"], "red" if request["message"] else "green")),
    )
    if request["message"]:
        text.append(f"  {request['message']}", "red")
    return text


def _placement_head(number: int, placement: dict[str, Any]) -> Text:
    decode, prefill = placement["decode"], placement["prefill"]
    way = "prefills by itself" if prefill == decode else f"with the prompt computed on {prefill}"
    if placement["channel"]:
        way += f", {placement['transfer_bytes'] / 1e6:,.1f} MB by {placement['channel']}"
    before = placement["output_tokens_before"]
    text = Text.assemble(
        (f"placement {number}: ", "bold"),
        f"{decode} {way}; cost {placement['cost']:,.0f}",
        f", of this for the way between them {placement['distance']:,.0f}" if placement["distance"] else "",
        f"; goes on after {before} tokens" if before else "",
        "  ",
        (placement["outcome"], _BAD.get(placement["outcome"], "red")),
    )
    if placement["message"]:
        text.append(f"  {placement['message']}", "red")
    return text


def _candidates(placement: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "candidate", "role"):
        table.add_column(title, no_wrap=True)
    for title in ("cost", "= queued", "+ prompt", "- credit", "+ decode", "cached", "blocks", "heat", "pace"):
        table.add_column(title, justify="right", no_wrap=True)
    for score in placement["candidates"]:
        table.add_row(
            "*" if score["chosen"] else "",
            score["worker_id"],
            score["role"],
            f"{score['cost']:,.0f}",
            *(f"{score[term]:,.0f}" for term in ("queued", "prompt", "credit", "decode")),
            f"{score['cached_tokens']}",
            f"{score['active_blocks']}",
            f"{score['heat']:.2f}",
            f"{score['pace']:.2f}",
            style="bold" if score["chosen"] else None,
        )
    return table


def _stages(placement: dict[str, Any]) -> Text:
    seconds = placement["seconds"]
    told = []
    for stage in _STAGES:
        if stage in seconds:
            name = stage.replace("_", " ")
            told.append(
                f"({name} {_ms(seconds[stage])})" if stage in _PARTS else f"{name} {_ms(seconds[stage])}"
            )
    return Text("  ".join(told) or "nothing was measured", "dim")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
