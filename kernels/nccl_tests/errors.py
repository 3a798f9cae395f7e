"""What can go wrong, each with a message for the person who runs the test."""

from __future__ import annotations


class NcclTestError(Exception):
    """The run ends here."""


class BadArguments(NcclTestError):
    """An option has a value that cannot be."""


class BackendMissing(NcclTestError):
    """No GPU, no cupy, no libnccl, or no torch."""


class CollectiveFailed(NcclTestError):
    """A collective raised, or NCCL reported an error while it ran."""


class CollectiveTimeout(NcclTestError):
    """A collective did not end in time, and was aborted."""


class RendezvousError(NcclTestError):
    """Ranks did not find each other, or one of them left."""
