"""What runs inside a cluster's processes, and the model it serves; tests put fakes in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.actors import WORKER_CLASS
from cluster.router_replica import ROUTER_CLASS


class LaunchError(Exception):
    """The cluster could not be started; the message says which part and why."""


class Prepared(Protocol):
    """What is known of a model once its files are in place (workers.models.catalog.PreparedModel)."""

    @property
    def path(self) -> Path: ...

    @property
    def served_name(self) -> str: ...


Prepare = Callable[[str, Callable[[str], None]], Prepared]


def prepare_from_catalog(name: str, say: Callable[[str], None]) -> Prepared:
    """Find, fetch and convert the model. Raises LaunchError."""
    from workers.models.catalog import prepare_model
    from workers.models.errors import ModelError

    try:
        prepared: Prepared = prepare_model(name, say=say)
    except ModelError as error:
        raise LaunchError(f"model {name!r}: {error}") from error
    return prepared


@dataclass(frozen=True, slots=True)
class Parts:
    """What is inside the processes; tests put fakes in their place."""

    worker_class: str = WORKER_CLASS
    router_class: str = ROUTER_CLASS
    prepare: Prepare = prepare_from_catalog
