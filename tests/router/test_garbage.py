"""What the settings of the garbage collector are, in a process of their own: they are for a whole process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from router.garbage import spare_requests

class Node:
    pass

spare_requests()
assert gc.isenabled()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold()[0] == 20_000

def cycle():
    node = Node()
    node.self = node
    return weakref.ref(node)

gone = cycle()
assert gone() is not None
kept = [[] for _ in range(20_001)]  # as many allocations as are waited for
assert gone() is None
"""


def test_what_is_there_is_spared_and_new_cycles_are_still_collected() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
