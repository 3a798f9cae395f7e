from __future__ import annotations

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.explain_view import ExplainError, fetch_explanation, render_explanation


def candidate(worker_id: str, role: str, cost: float, chosen: bool) -> dict:
    return {
        "worker_id": worker_id,
        "role": role,
        "queued_prefill_tokens": 30,
        "cached_tokens": 64,
        "uncached_tokens": 936,
        "active_blocks": 12,
        "cost": cost,
        "queued": 30.0,
        "prompt": 1000.0,
        "credit": 64.0,
        "decode": 12.0,
        "heat": 1.25,
        "pace": 2.0,
        "chosen": chosen,
    }


def placement(**fields: object) -> dict:
    return {
        "decode": "d0",
        "prefill": "p0",
        "cost": 2022.0,
        "distance": 78.0,
        "prompt_tokens": 1000,
        "output_tokens_before": 0,
        "cached_tokens": 64,
        "workers_with_a_prefix": 1,
        "local_prefill_max": 64,
        "candidates": [candidate("d0", "decode", 978.0, True), candidate("p1", "prefill", 5000.0, False)],
        "seconds": {
            "queue": 0.0005,
            "choose": 0.0001,
            "reserve": 0.002,
            "prefill": 0.05,
            "first_token": 0.07,
        },
        "transfer_bytes": 2_500_000,
        "channel": "shm",
        "outcome": "finished",
        "message": "",
        **fields,
    }


FOUND = {
    "router_id": "abc",
    "requests": [
        {
            "request_id": "cmpl-1",
            "policy": "cost",
            "began_at": 0.0,
            "prompt_tokens": 1000,
            "output_tokens": 20,
            "first_token_s": 0.0726,
            "outcome": "stop",
            "message": "",
            "placements": [
                placement(
                    outcome="link_lost", message="decode worker d0: gone", channel=None, transfer_bytes=None
                ),
                placement(output_tokens_before=7),
            ],
        }
    ],
}


def text_of(found: dict) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_explanation(found))
    return console.export_text()


def test_every_term_of_the_cost_is_shown():
    text = text_of(FOUND)
    assert "cmpl-1" in text
    assert "first token 72.6 ms" in text
    assert "placement 1: d0 with the prompt computed on p0; cost 2,022" in text
    assert "link_lost  decode worker d0: gone" in text
    assert "goes on after 7 tokens" in text
    assert "2.5 MB by shm" in text
    (row,) = [line for line in text.splitlines() if line.startswith("*") and "d0" in line][:1]
    assert row.split() == ["*", "d0", "decode", "978", "30", "1,000", "64", "12", "64", "12", "1.25", "2.00"]
    assert "queue 0.50 ms  choose 0.10 ms  reserve 2.00 ms  (prefill 50.00 ms)  first token 70.00 ms" in text


@pytest.fixture
def router() -> Iterator[ThreadingHTTPServer]:
    """Knows a request at the third time it is asked, as one of several replicas behind one port would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append((self.path, self.headers.get("Authorization")))
            status, body = 404, {"error": {"message": "this router does not know it"}}
            if self.path.endswith("/cmpl-1") and len(self.server.asked) >= 3:
                status, body = 200, FOUND
            elif self.path.endswith("/secret"):
                status, body = 401, {"error": {"message": "an API key is required"}}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_replicas_are_asked_until_one_knows(router):
    url = f"http://127.0.0.1:{router.server_address[1]}"
    assert fetch_explanation(url, "cmpl-1", "key") == FOUND
    assert router.asked == [("/cluster/requests/cmpl-1", "Bearer key")] * 3
    with pytest.raises(ExplainError, match="does not know it"):
        fetch_explanation(url, "a/b")
    assert router.asked[-1][0] == "/cluster/requests/a%2Fb"
    with pytest.raises(ExplainError, match="401: an API key is required"):
        fetch_explanation(url, "secret")


def test_the_command(router):
    url = f"http://127.0.0.1:{router.server_address[1]}"
    shown = CliRunner().invoke(app, ["explain", "cmpl-1", "--url", url])
    assert shown.exit_code == 0
    assert "placement 2" in shown.output
    raw = CliRunner().invoke(app, ["explain", "cmpl-1", "--url", url, "--json"])
    assert json.loads(raw.output) == FOUND
    nobody = CliRunner().invoke(app, ["explain", "x", "--url", "http://127.0.0.1:9"])
    assert nobody.exit_code == 1
