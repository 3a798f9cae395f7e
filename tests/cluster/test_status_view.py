"""What `headrace status` makes of a router's answer."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cluster.status_view import render_status


def shown(status: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_status(status, "http://here"))
    return console.export_text()


def test_the_roads_of_kv_blocks_are_shown() -> None:
    way = {
        "road": "tcp",
        "channels": 2,
        "sent_bytes": 5_000_000,
        "bytes_per_s": 3.21e9,
        "passed_over": ["nccl: decode-0 does not offer it", "shm: it is on another host"],
    }
    opening = {"road": "", "channels": 0, "sent_bytes": 0, "bytes_per_s": 0.0, "passed_over": []}
    worker = {"worker_id": "prefill-0", "state": "up", "peers": {"decode-0": way, "decode-1": opening}}
    lines = [" ".join(line.split()) for line in shown({"workers": [worker]}).splitlines()]
    assert "KV blocks from to road channels sent rate passed over" in lines
    reasons = "nccl: decode-0 does not offer it; shm: it is on another host"
    assert f"prefill-0 decode-0 tcp 2 5 MB 3.21 GB/s {reasons}" in lines
    assert "prefill-0 decode-1 opening 0 0 MB -" in lines


def test_without_roads_there_is_no_table_of_them() -> None:
    assert "KV blocks from" not in shown({"workers": [{"worker_id": "d", "state": "up", "peers": {}}]})


def test_trouble_with_experts_is_said() -> None:
    group = {
        "group": "decode-ep0",
        "version": 3,
        "phase": "refused",
        "text": "rank 1 has no room",
        "trouble": True,
    }
    assert "experts of decode-ep0: placement 3, refused: rank 1 has no room" in shown({"experts": [group]})
    assert "experts of" not in shown({"experts": []})
