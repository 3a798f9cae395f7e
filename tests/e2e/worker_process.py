"""`python -m workers` as a child of a nursery: without the seconds that an interpreter takes to load torch."""

from __future__ import annotations

import os
from typing import Any

from workers.environment import limit_libraries

limit_libraries(1)  # before torch is there

import workers.engine.native_runner  # noqa: E402
import workers.models.native  # noqa: E402
import workers.worker  # noqa: E402, F401
from workers.__main__ import main  # noqa: E402


def serve(config: dict[str, Any], fd: int) -> int:
    """`config`: {"arguments": of `python -m workers`}; `fd`: for all that it writes."""
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)
    return main(config["arguments"])
