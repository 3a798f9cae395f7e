"""`headrace experts` on what the router really says of a group."""

from __future__ import annotations

import builtins
import io
import json

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.experts_view import ExpertsError, draw_experts, fetch_experts, render_experts
from router.config import ExpertsConfig
from router.experts.view import view_of
from router.experts.watched import Watched
from tests.cluster.api_server import ApiServer
from tests.router.experts.groups import EXPERTS, LAYERS, RANKS, group
from workers.protocol.expert_messages import ExpertCounts, ExpertPost
from workers.protocol.experts import Placement

# Expert 3 of layer 1 is hot, and has copies on ranks 1 and 2.
PLACED = Placement(4, (((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 1), (2, 3), (3, 4, 5), (6, 7))))
ROUTED = np.full((LAYERS, EXPERTS), 100)
ROUTED[1, 3] = 900
COMPUTED = {0: [200, 200], 1: [200, 550], 2: [200, 650], 3: [200, 200]}


def watched(changes=None, counted: bool = True) -> Watched:
    found = Watched(group(PLACED, changes), ExpertsConfig())
    found.loads.placed(4)
    for rank, computed in COMPUTED.items() if counted else ():
        routed = ROUTED // RANKS
        columns = np.zeros((LAYERS, 3))
        columns[:, 0] = computed
        blobs = (np.asarray(routed, "<u4").tobytes(), np.asarray(columns, "<u4").tobytes())
        found.take(ExpertCounts("g", rank, f"g-{rank}", 1, 1, 1.0, 4, 1, *blobs), 0.0)
    found.look(found.group, ExpertPost("g", PLACED, "r1", 1e9, "it was uneven"), 0.0)
    return found


async def said(watched: Watched) -> dict:
    """As it arrives at the command: through JSON."""
    groups = [await view_of(watched, 0.0)]
    told = {"router": "r1", "planner": "r1", "rebalance": True, "trouble": "", "groups": groups}
    return json.loads(msgspec.json.encode(told))


def text_of(found: dict, top: int = 3) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_experts(found, top))
    return console.export_text()


async def test_hot_experts_and_where_they_are():
    text = text_of(await said(watched()))
    assert "g  decode  2 layers × 8 experts on 4 ranks, 12 slots in each layer" in text
    # Layer 0: 800 / 4 over 200. Layer 1: 1600 / 4 over the 650 of rank 2.
    assert f"measured {(200 + 400) / (200 + 650):.3f}  predicted {(200 + 400) / (200 + 650):.3f}" in text
    assert "placement     4 in use; posted by router r1: it was uneven" in text
    (row,) = [line for line in text.splitlines() if line.startswith("    1")]
    assert row.split() == ["1", "3", "4.50", "1", "(1.38),", "2", "(1.62)"]
    (row,) = [line for line in text.splitlines() if "g-2" in line]
    assert row.split()[:3] == ["2", "g-2", "-"]
    assert row.split()[3:8] == ["in", "use", "4", "3", "1"]
    assert row.split()[8] == f"{850 / 600:.3f}"


async def test_a_rank_that_the_others_have_given_up_but_that_still_reports_is_left_out():
    others = {rank: {"members": [0, 1, 2]} for rank in (0, 1, 2)}
    found = watched(others)
    found.look(found.group, ExpertPost("g", Placement(5, PLACED.layers), "r1", 1e9, "rank 3 left"), 1.0)
    states = [rank["state"] for rank in (await said(found))["groups"][0]["ranks"]]
    assert states == ["loading", "loading", "loading", "left out"]


async def test_the_best_possible_is_a_bound():
    view = await said(watched())
    best = view["groups"][0]["balancedness"]["best"]
    assert view["groups"][0]["balancedness"]["predicted"] <= best <= 1


async def test_ranks_that_refuse_lack_or_are_gone_are_named():
    changes = {
        0: {"refused": 5, "reason": "no memory", "members": [0, 1, 2]},
        1: {"members": [0, 1, 2]},
        2: {"ready": 5, "members": [0, 1, 2]},
        3: None,
    }
    found = watched(changes)
    found.look(found.group, ExpertPost("g", Placement(5, PLACED.layers), "r1", 1e9, "it was uneven"), 1.0)
    view = await said(found)
    states = [rank["state"] for rank in view["groups"][0]["ranks"]]
    assert states == ["refuses", "loading", "ready", "gone"]
    text = text_of(view)
    assert "placement     4, 5 is under way" in text


async def test_before_anything_is_counted():
    view = await said(watched(counted=False))
    assert view["groups"][0]["balancedness"] == {"measured": None, "predicted": None, "best": None}
    assert "no counts yet" in text_of(view)
    with pytest.raises(ExpertsError, match="no tokens have been counted yet"):
        draw_experts(view, None)


async def test_ranks_that_are_switching_have_no_placement_to_show():
    view = await said(watched({0: {"version": 5, "ready": 5}}))
    assert view["groups"][0]["placement"] is None
    assert "the ranks are switching" in text_of(view)


@pytest.fixture
def router():
    server = ApiServer()
    yield server
    server.close()


async def test_the_command(router, tmp_path):
    pytest.importorskip("matplotlib")
    view = await said(watched())
    router.says("/cluster/experts", view)
    shown = CliRunner().invoke(app, ["experts", "--url", router.url, "--top", "1"])
    assert shown.exit_code == 0
    assert "hot expert" in shown.output
    raw = CliRunner().invoke(app, ["experts", "--url", router.url, "--json", "--api-key", "k"])
    assert json.loads(raw.output) == view
    assert router.requests[-1][2]["Authorization"] == "Bearer k"
    picture = tmp_path / "heat.png"
    drawn = CliRunner().invoke(app, ["experts", "--url", router.url, "--png", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(
        app, ["experts", "--url", router.url, "--png", str(tmp_path / "heat.nonsense")]
    )
    assert wrong.exit_code == 1
    assert "can't be written" in wrong.output


def test_a_router_that_does_not_answer_or_will_not(router):
    with pytest.raises(ExpertsError, match="no cluster answers"):
        fetch_experts("http://127.0.0.1:9")
    router.says("/cluster/experts", {"error": {"message": "tenant 't' may not read it"}}, 403)
    with pytest.raises(ExpertsError, match="403: tenant 't' may not read it"):
        fetch_experts(router.url)
    router.says("/cluster/experts", {})
    with pytest.raises(ExpertsError, match="not a Headrace router"):
        fetch_experts(router.url)


def test_a_model_without_experts():
    text = text_of({"router": "r", "planner": "", "rebalance": True, "trouble": "", "groups": []})
    assert "No model with experts" in text


async def test_without_matplotlib_a_picture_is_refused_with_what_to_do(monkeypatch, tmp_path):
    really = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError(name)
        return really(name, *args, **kwargs)

    view = await said(watched())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExpertsError, match=r"pip install 'headrace\[bench\]'"):
        draw_experts(view, tmp_path / "heat.png")
