"""How a worker's process lets Python collect cyclic garbage."""

from __future__ import annotations

import gc

_ALLOCATIONS = 20_000  # more objects made than freed, between two looks at the youngest
_YOUNG, _OLD = 20, 100  # looks at one generation before one at the next


def spare_steps() -> None:
    """Once, when everything has been imported, loaded and started.

    What is there now stays for the life of the process, and is never looked through again; what requests leave behind is
    freed by reference counts, but for the few cycles of exceptions. To look through the modules of torch and all else
    that a worker has loaded takes a tenth of a second or more, in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, _YOUNG, _OLD)
