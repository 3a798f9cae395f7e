"""Which model is served, asked by name."""

from __future__ import annotations

from router.generation import Dispatcher, ModelInfo, Unavailable
from router.refusal import model_not_found


def served_model(dispatcher: Dispatcher, asked: str | None) -> ModelInfo:
    """Raises `Unavailable` before a worker has registered, `Refusal` (404) for another model's name."""
    model = dispatcher.model()
    if model is None:
        raise Unavailable("no worker has registered yet: the model is still being loaded", retry_after_s=5.0)
    if asked is not None and asked != model.name:
        raise model_not_found(asked, model.name)
    return model
