"""GET /v1/models and /v1/models/{id}"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.responses import Response

from router.generation import ModelInfo
from router.http.front import Front
from router.serving import served_model


class ModelsEndpoint:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._created = int(time.time())  # s since 1970

    async def list(self) -> Response:
        """Empty before a worker has registered."""
        model = self._front.dispatcher.model()
        data = [] if model is None else [self._entry(model)]
        return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")

    async def get(self, model_id: str) -> Response:
        entry = self._entry(served_model(self._front.dispatcher, model_id))
        return Response(msgspec.json.encode(entry), media_type="application/json")

    def _entry(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "headrace",
            "max_model_len": model.max_model_len,
        }
