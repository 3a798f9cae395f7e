"""A client's mistake, found at the edge before anything is asked of a worker."""

from __future__ import annotations

from router.generation import GenerationError


class Refusal(GenerationError):
    """Names the field, what came and what is allowed. Shared by HTTP and gRPC, which word it in their own shape."""

    status = 400
    kind = "invalid_request_error"

    def __init__(
        self, message: str, param: str | None = None, *, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def not_supported_yet(param: str) -> Refusal:
    """A documented field that asks for something Headrace cannot do: said aloud, never dropped in silence."""
    return Refusal(f"{param} is not supported yet", param, code="unsupported_parameter")


def model_not_found(asked: str, served: str) -> Refusal:
    return Refusal(
        f"the model {shown(asked)} does not exist here, {served!r} is served",
        "model",
        code="model_not_found",
        status=404,
    )


def shown(value: object, limit: int = 64) -> str:
    """What came, short enough for an error message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
