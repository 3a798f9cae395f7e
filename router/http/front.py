"""What the endpoints share: the parts of the router that a request meets."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.chat.prompt import Prompts
from router.config import HttpConfig
from router.generation import Dispatcher
from router.metrics import RouterMetrics
from router.sessions import Sessions
from router.tenants import Tenants


@dataclass(frozen=True, slots=True)
class Front:
    dispatcher: Dispatcher
    prompts: Prompts
    metrics: RouterMetrics
    sessions: Sessions
    config: HttpConfig
    tenants: Tenants = field(default_factory=Tenants)
