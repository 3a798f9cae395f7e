"""What the ways in (http, grpc) ask of the life of a request (dispatch), and what it can answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from workers.protocol.messages import FinishReason, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model, as the router must know it to validate and render requests."""

    name: str
    max_model_len: int  # tokens of prompt + output
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate. A request with n > 1 choices or several prompts is several of these."""

    request_id: str  # unique for each sequence
    prompt: list[int]
    sampling: Sampling
    cache_salt: str = ""
    priority: int = 0
    tenant: str = "default"
    deadline: float | None = None  # time.monotonic() at which the whole answer is of no use any more
    expected_output: int = (
        0  # tokens, as the tenant's answers are long; admission shares by it, nothing else does
    )


class TokenChunk(Struct, frozen=True):
    """Tokens in order, without gaps or repeats, whatever died on the way. The last one has a finish_reason."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] = []  # as many as tokens when asked for
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0


class GenerationError(Exception):
    """A request that ends without an answer. `status` is the HTTP status it maps to."""

    status = 500
    kind = "server_error"

    def __init__(
        self, message: str, retry_after_s: float | None = None, *, reason: str | None = None
    ) -> None:
        """`reason`: why admission turned it away, as metrics count it."""
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.reason = reason


class InvalidRequest(GenerationError):
    """Found by the engine: the request can never be served as it stands."""

    status = 400
    kind = "invalid_request_error"


class Overloaded(GenerationError):
    status = 429
    kind = "rate_limit_error"


class TenantLimit(Overloaded):
    """The tenant has used up what it may: others are served meanwhile."""


class DeadlineExceeded(GenerationError):
    """The client's own time is over."""

    status = 504
    kind = "timeout_error"


class Unavailable(GenerationError):
    """No worker can take it now, or it lost too many workers."""

    status = 503
    kind = "service_unavailable_error"


class Dispatcher(Protocol):
    """Implemented by router/dispatch.py; faked in the tests of http and grpc."""

    def model(self) -> ModelInfo | None:
        """None until a worker has registered."""

    def ready(self) -> bool:
        """True when a request could be served now: a decode worker is connected."""

    def generate(self, generation: Generation) -> AsyncIterator[TokenChunk]:
        """Streams the answer; raises GenerationError. Closing the iterator early cancels the request everywhere."""

    async def status(self) -> dict[str, Any]:
        """Pools, workers, epochs, blocks, hit rates: what `headrace status --json` prints."""

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Why it went where it went: what `headrace explain --json` prints. None: not known here."""

    async def experts_view(self) -> dict[str, Any]:
        """Load and placement of experts: what `headrace experts --json` prints."""

    async def worker_metrics(self) -> list[bytes]:
        """Prometheus text of each connected worker."""
