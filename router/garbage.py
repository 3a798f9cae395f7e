"""How a router process lets Python collect cyclic garbage."""

from __future__ import annotations

import gc

_ALLOCATIONS = (
    20_000  # between two looks at the youngest objects; Python's own 700 are made by two or three requests
)
_YOUNG, _OLD = 20, 100  # looks at one generation before one at the next


def spare_requests() -> None:
    """Once, when everything has been imported and started.

    What is there now stays for the life of the process, and is never looked through again; what requests leave behind is
    freed by reference counts, but for the few cycles of exceptions. Without this a fifth of a request's CPU time goes
    into looking through modules.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, _YOUNG, _OLD)
