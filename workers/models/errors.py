"""What this room raises."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be fetched, read or run. The message says what was wrong and what to do."""


class NotExpressed(ModelError):
    """A config that may be sound, but asks for what DecoderSpec has no word for; transformers may run it."""


class NotHere(Exception):
    """The native kernels cannot run this model on this machine; torch can. The message says why."""
