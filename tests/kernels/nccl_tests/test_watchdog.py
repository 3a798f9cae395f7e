"""What hangs is aborted and told, and holds nobody."""

from __future__ import annotations

import threading
import time

import pytest

from kernels.nccl_tests.errors import CollectiveFailed, CollectiveTimeout
from kernels.nccl_tests.watchdog import Watched


def test_answers_and_errors_come_back() -> None:
    watched = Watched(5.0, lambda: None)
    assert watched.call("adding", lambda: 1 + 1) == 2
    with pytest.raises(CollectiveFailed, match=r"^dividing: integer division or modulo by zero$"):
        watched.call("dividing", lambda: 1 // 0)
    assert watched.call("again", threading.get_ident) == watched.call("again", threading.get_ident)
    watched.close()


def test_a_hang_is_aborted() -> None:
    freed = threading.Event()
    watched = Watched(0.1, freed.set)
    with pytest.raises(
        CollectiveTimeout, match=r"^rank 1: all_reduce of 8 B: not done after 0\.1 s, aborted$"
    ):
        watched.call("rank 1: all_reduce of 8 B", freed.wait)
    assert freed.is_set()
    with pytest.raises(CollectiveFailed, match="an earlier collective was aborted"):
        watched.call("the next", lambda: None)


def test_what_no_abort_frees_is_left_behind() -> None:
    never = threading.Event()
    watched = Watched(0.1, never.wait, grace_s=0.1)  # abort hangs too
    with pytest.raises(CollectiveTimeout):
        watched.call("stuck", never.wait)
    never.set()


def test_an_error_in_the_background_ends_it_before_its_time() -> None:
    freed = threading.Event()
    watched = Watched(60.0, freed.set, lambda: "NCCL_ERROR_SYSTEM_ERROR: a peer is gone")
    with pytest.raises(CollectiveFailed, match="rank 0: reduce: NCCL_ERROR_SYSTEM_ERROR: a peer is gone"):
        watched.call("rank 0: reduce", freed.wait)


def test_host_work_is_not_limited() -> None:
    watched = Watched(0.05, lambda: None)
    watched.call("counting", lambda: time.sleep(0.3), timeout_s=0)
    watched.close()
