"""The command line through typer's runner: what a person types, and what they read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.address import Address
from cluster.cli import app
from cluster.foreground import curl_line
from cluster.runfile import Run, RunFile
from tests.cluster.api_server import ApiServer

ROOT = Path(__file__).resolve().parents[2]
STATUS: dict[str, Any] = {
    "model": {"name": "smol", "max_model_len": 8192, "vocab_size": 49152},
    "redis": "ok",
    "queue": 3,
    "in_flight": 5,
    "workers": [
        {
            "worker_id": "decode-0",
            "role": "decode",
            "state": "up",
            "epoch": 1795337922420,
            "address": "127.0.0.1:4711",
            "device": "cpu",
            "pid": 42,
            "running": 2,
            "waiting": 1,
            "reserved": 0,
            "sending": 0,
            "blocks": {"total": 1456, "used": 9, "cached": 7, "free": 1447},
            "prefix_hit_rate": 0.256,
            "output_tokens": 1234,
        }
    ],
}


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> Path:
    return cache


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("serve", "down", "status", "explain", "chat", "config"):
        assert command in result.output


def test_version() -> None:
    assert run("--version").output.startswith("headrace 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["serve", "--set", "router.http.prt=1"],
            "router.http.prt: no such setting; did you mean router.http.port?",
        ),
        (["serve", "--decode", "0"], "pools.decode.replicas: 0 is not allowed"),
        (
            ["serve", "--device", "gpu"],
            "engine.device: 'gpu' is not allowed: must be 'auto', 'cpu' or 'cuda'",
        ),
        (["serve", "--port", "x"], "Invalid value for '--port'"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml: can't read the configuration"),
        (["serve", "--set", "nonsense"], "expected NAME=VALUE"),
        (["serve", "--prot", "1"], "No such option: --prot"),
        (["config", "--set", "a=1"], "a: no such setting"),
        (
            ["serve", "--set", "router.policy.name=best"],
            "router.policy.name: 'best' is not allowed: must be one of cost, round_robin",
        ),
        (
            ["serve", "--set", "router.policy.name=my.own:Policy"],
            "router.policy.name is 'my.own:Policy': No module",
        ),
    ],
)
def test_mistakes_end_with_2_and_no_traceback(arguments: list[str], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.output
    assert "Traceback" not in result.output


def test_config_prints_what_is_in_force(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("security: {cluster_secret: 0123456789abcdef}\n")
    result = run("config", "--config", str(path), "--set", "router.http.port=8123")
    assert result.exit_code == 0
    printed = yaml.safe_load(result.output)
    assert printed["router"]["http"]["port"] == 8123
    assert "0123456789abcdef" not in result.output


def test_config_example_is_the_file_that_is_shipped() -> None:
    assert run("config", "--example").output == (ROOT / "deploy" / "config.example.yaml").read_text()


def test_serve_refuses_what_the_machine_can_not_do() -> None:
    result = run("serve", "--set", "pools.decode.num_gpus=64", "--port", "0", "--grpc-port", "0")
    assert result.exit_code == 1
    assert "need 64 GPUs, this machine has" in result.output


def test_serve_names_a_port_in_use(api: ApiServer) -> None:
    port = api.url.rpartition(":")[2]
    result = run("serve", "--port", port, "--grpc-port", "0")
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 is in use; choose another with --port" in result.output


def test_serve_names_the_one_that_runs_already() -> None:
    held = RunFile("headrace")
    try:
        result = run("serve")
    finally:
        held.remove()
    assert result.exit_code == 1
    assert f"running already (pid {os.getpid()}" in result.output


def test_status_shows_workers(api: ApiServer) -> None:
    api.says("/cluster", STATUS)
    result = run("status", "--url", api.url)
    assert result.exit_code == 0
    for text in (
        "smol",
        "in flight 5",
        "queue 3",
        "decode-0",
        "up",
        "9/1456",
        "26%",
        "127.0.0.1:4711",
        "1234",
    ):
        assert text in result.output


def test_status_as_json_is_what_the_router_said(api: ApiServer) -> None:
    api.says("/cluster", STATUS)
    assert json.loads(run("status", "--url", api.url, "--json").output) == STATUS


def test_status_of_a_router_that_knows_little(api: ApiServer) -> None:
    api.says("/cluster", {"model": None, "workers": [{"worker_id": "w"}]})
    result = run("status", "--url", api.url)
    assert result.exit_code == 0
    assert "w" in result.output


def test_status_sends_the_key(api: ApiServer) -> None:
    api.says("/cluster", {"error": {}}, status=401)
    result = run("status", "--url", api.url)
    assert result.exit_code == 1
    assert "wants an API key: pass --api-key or set HEADRACE_API_KEY" in result.output
    api.says("/cluster", STATUS)
    assert run("status", "--url", api.url, "--api-key", "k1").exit_code == 0
    assert api.requests[-1][2]["Authorization"] == "Bearer k1"


def test_status_finds_the_cluster_that_runs_here(api: ApiServer) -> None:
    api.says("/cluster", STATUS)
    held = RunFile("here")
    try:
        assert "still starting" in run("status", "--cluster", "here").output
        held.write(Run(cluster="here", pid=os.getpid(), url=api.url))
        assert run("status").exit_code == 0
        assert run("status", "--cluster", "here").exit_code == 0
        result = run("status", "--cluster", "elsewhere")
        assert result.exit_code == 1
        assert "no cluster named 'elsewhere' is running here" in result.output
    finally:
        held.remove()


def test_status_without_a_cluster() -> None:
    result = run("status", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "no cluster answers at http://127.0.0.1:9" in result.output
    assert "Traceback" not in result.output


def test_status_of_what_is_no_router(api: ApiServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # a gRPC port, say
        port = other.getsockname()[1]

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\0\0\6\4" + bytes(9))

        threading.Thread(target=answer, daemon=True).start()
        for url in (f"http://127.0.0.1:{port}", "http://localhost:80a0", "http://[::1"):
            for command in ("status", "chat"):
                if command == "chat" and url.endswith(str(port)):
                    continue  # answered once
                result = run(command, "--url", url)
                assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
                assert url in result.output
    api.answers["/v1/models"] = lambda body: (200, "<html>")
    assert "is not a Headrace router" in run("chat", "--url", api.url).output


def test_a_cluster_that_was_named_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_URL", "http://127.0.0.1:9")
    assert "no cluster named 'mine' is running here" in run("status", "--cluster", "mine").output


def test_status_goes_by_no_proxy(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    api.says("/cluster", STATUS)
    assert run("status", "--url", api.url).exit_code == 0


def test_down_without_a_cluster() -> None:
    result = run("down")
    assert (result.exit_code, result.output) == (0, "no cluster is running here\n")


def test_the_curl_line_can_be_pasted() -> None:
    line = curl_line(Address("http://127.0.0.1:8000", "", "it's a model"), with_key=True)
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shown = subprocess.run(
        ["sh", "-c", line.replace("curl ", f"{sys.executable} -c '{program}' ", 1)],
        env={"HEADRACE_API_KEY": "k"},
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = json.loads(shown.stdout)
    assert arguments[0] == "http://127.0.0.1:8000/v1/chat/completions"
    assert "Authorization: Bearer k" in arguments
    assert json.loads(arguments[-1])["model"] == "it's a model"


def test_light_commands_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom cluster.cli import app\n"
        "CliRunner().invoke(app, ['status', '--url', 'http://127.0.0.1:9'])\nCliRunner().invoke(app, ['config'])\n"
        "print([name for name in ('ray', 'torch', 'transformers', 'numpy', 'redis', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
