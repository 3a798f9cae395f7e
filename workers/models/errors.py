"""The one error of this room."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be fetched, read or run. The message says what was wrong and what to do."""
