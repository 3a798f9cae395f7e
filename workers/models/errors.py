"""What this room raises."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be fetched, read or run. The message says what was wrong and what to do."""


class NotHere(Exception):
    """The native kernels cannot run this model on this machine; torch can. The message says why."""
