"""The paths that pass FastAPI by are answered, listed and counted like all others."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
}


@pytest.mark.parametrize("path", BODIES)
async def test_a_hot_path_is_a_path_like_others(app: FastAPI, path: str) -> None:
    async with httpx.AsyncClient(base_url="http://router", transport=httpx.ASGITransport(app)) as http:
        answered = await http.post(path, json=BODIES[path])
        refused = await http.post(path, json={"nonsense": 1})
        other_method = await http.get(path)
        below = await http.post(f"{path}/more", json=BODIES[path])
        listed = (await http.get("/openapi.json")).json()["paths"]
        metrics = (await http.get("/metrics")).text
    assert (answered.status_code, refused.status_code) == (200, 400)
    assert answered.json()["choices"][0]["finish_reason"] == "stop"
    assert refused.json()["error"]["param"] == "nonsense"
    assert other_method.status_code == 405
    assert other_method.json()["error"]["message"] == f"GET is not allowed on {path!r}"
    assert below.status_code == 404
    assert all("x-request-id" in response.headers for response in (answered, refused, other_method, below))
    assert set(listed[path]) == {"post"}
    for status in ("200", "400", "405"):
        assert f'headrace_http_responses_total{{route="{path}",status="{status}"}} 1.0' in metrics
