"""Sleeping on a word of shared memory until another process changes it (Linux, futex(2))."""

from __future__ import annotations

import ctypes
import platform

_WAIT, _WAKE = 0, 1  # not FUTEX_PRIVATE: the word is shared between processes
_EVERYBODY = 2**31 - 1
_NUMBER = {"x86_64": 202}.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def lacks() -> str | None:
    """Why it can't be used here.

    Data is written before the word that announces it, by Python, which has no fences: x86 keeps that order by itself.
    """
    return (
        None
        if _NUMBER is not None
        else f"stores of a {platform.machine()} are not ordered as those of x86-64"
    )


class Word:
    """A uint32 at an address that stays mapped. Other threads run while one sleeps."""

    def __init__(self, address: int) -> None:
        self._word = ctypes.c_uint32.from_address(address)
        self._address = ctypes.c_void_p(address)

    @property
    def value(self) -> int:
        return self._word.value

    def announce(self, value: int) -> None:
        self._word.value = value
        self.wake()

    def wake(self) -> None:
        _libc.syscall(_NUMBER, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def sleep_while(self, value: int, timeout_s: float) -> None:
        """Returns at once when it is another; otherwise woken, after the time, or for no reason."""
        seconds = int(timeout_s)
        limit = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
        _libc.syscall(_NUMBER, self._address, _WAIT, ctypes.c_uint32(value), ctypes.byref(limit), None, 0)
