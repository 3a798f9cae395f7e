"""`headrace experts`: which experts of a MoE model are hot, where their copies are, and what is done about it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TIMEOUT_S = 8.0
_BAR = 20  # characters
_STATES = {"in use": "green", "ready": "cyan", "loading": "cyan", "refuses": "red", "missing": "red"}
_MOST = 4.0  # times the mean of its layer: the end of the colours


class ExpertsError(Exception):
    """Nothing to show."""


def fetch_experts(url: str, api_key: str | None = None) -> dict[str, Any]:
    """GET {url}/cluster/experts. Raises ExpertsError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    path = f"{url.rstrip('/')}/cluster/experts"
    try:
        with direct.open(urllib.request.Request(path, headers=headers), timeout=_TIMEOUT_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ExpertsError(f"{path} answered {error.code}: {_message(error)}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ExpertsError(f"no cluster answers at {url}: {getattr(error, 'reason', error)}") from error
    if not isinstance(found, dict) or "groups" not in found:
        raise ExpertsError(f"{url} is not a Headrace router")
    return found


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def render_experts(found: dict[str, Any], top: int) -> RenderableType:
    """For each group: how even the load is, what is under way, its ranks, and the `top` hottest experts."""
    if not found["groups"]:
        return Text("No model with experts spread over ranks is being served.")
    parts: list[RenderableType] = []
    if found["trouble"]:
        parts.append(Text(found["trouble"], "red"))
    for group in found["groups"]:
        parts += [_head(group, found), Text(), _ranks(group), Text(), _hottest(group, top), Text()]
    return Group(*parts[:-1])


def _head(group: dict[str, Any], found: dict[str, Any]) -> Text:
    balance = group["balancedness"]
    text = Text.assemble(
        (group["group"], "bold"),
        f"  {group['pool']}  {group['layers']} layers × {group['experts']} experts on {len(group['ranks'])} ranks, "
        f"{sum(group['slots'])} slots in each layer\n",
        f"balancedness  measured {_number(balance['measured'])}  predicted {_number(balance['predicted'])}  "
        f"best possible {_number(balance['best'])}  (mean / fullest rank; 1 is even)\n",
        f"placement     {group['version']}",
        f", {group['posted']} is under way" if group["posted"] > group["version"] else " in use",
    )
    if group["why"]:
        text.append(f"; posted by router {group['posted_by']}: {group['why']}", "dim")
    planner = found["planner"] or "nobody just now"
    text.append(f"\nrebalancing   {group['phase']}: ", "bold" if group["trouble"] else "")
    text.append(group["text"], "red" if group["trouble"] else "")
    if found["rebalance"]:
        text.append(f"  (planned by router {planner})", "dim")
    if group["last_plan"] is not None:
        text.append(f"\nlast plan     {group['last_plan']['text']}", "dim")
    return text


def _ranks(group: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (("rank", "right"), ("worker", "left"), ("node", "left"), ("state", "left")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for title in ("version", "slots", "speed", "load"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("of the mean", no_wrap=True)
    most = max([rank["load"] or 0.0 for rank in group["ranks"] if "load" in rank] or [1.0])
    for rank in group["ranks"]:
        state = Text(rank["state"], _STATES.get(rank["state"], "yellow"))
        if "worker_id" not in rank:
            table.add_row(str(rank["rank"]), "-", "-", state, "-", "-", "-", "-", "")
            continue
        load = rank["load"]
        table.add_row(
            str(rank["rank"]),
            rank["worker_id"],
            rank["node"] or "-",
            state,
            str(rank["version"]),
            str(rank["slots"]),
            f"{rank['speed']:g}",
            _number(load),
            "█" * round(_BAR * (load or 0.0) / max(most, 1e-9)),
        )
    return table


def _hottest(group: dict[str, Any], top: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("layer", "hot expert", "× mean"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("on ranks (× mean of ranks)")
    found = sorted(
        ((load, layer, expert) for layer, row in enumerate(group["load"]) for expert, load in enumerate(row)),
        key=lambda one: (-one[0], *one[1:]),
    )
    for load, layer, expert in found[:top]:
        table.add_row(str(layer), str(expert), f"{load:.2f}", _holders(group, layer, expert))
    return table


def _holders(group: dict[str, Any], layer: int, expert: int) -> str:
    if group["placement"] is None:
        return "the ranks are switching"
    ranks = [rank for rank, experts in enumerate(group["placement"][layer]) if expert in experts]
    return ", ".join(f"{rank} ({group['rank_load'][layer][rank]:.2f})" for rank in ranks) or "nowhere"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_experts(found: dict[str, Any], path: Path) -> None:
    """A heat map for each group: experts by layer, and ranks by layer. Raises ExpertsError."""
    groups = [group for group in found["groups"] if group["tokens"]]
    if not groups:
        raise ExpertsError("there is nothing to draw: no tokens have been counted yet")
    try:
        import matplotlib
    except ImportError:
        raise ExpertsError("a picture needs matplotlib: pip install 'headrace[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(15, 1.5 + 4.5 * len(groups)), squeeze=False, width_ratios=(3, 1)
    )
    for (left, right), group in zip(axes, groups, strict=True):
        image = left.imshow(
            group["load"], aspect="auto", cmap="inferno", vmin=0, vmax=_MOST, interpolation="nearest"
        )
        left.set(xlabel="expert", ylabel="layer with experts")
        balance = group["balancedness"]
        left.set_title(
            f"{group['group']}: tokens of each expert, × mean of its layer · placement {group['version']} · "
            f"balancedness {_number(balance['measured'] or balance['predicted'])}"
        )
        figure.colorbar(image, ax=left, extend="max")
        if group["rank_load"] is None:
            right.set_title("the ranks are switching")
            continue
        image = right.imshow(
            group["rank_load"], aspect="auto", cmap="coolwarm", vmin=0.5, vmax=1.5, interpolation="nearest"
        )
        right.set(xlabel="rank", title="tokens of each rank, × mean")
        figure.colorbar(image, ax=right, extend="both")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise ExpertsError(f"{path} can't be written: {error}") from error
    finally:
        pyplot.close(figure)
