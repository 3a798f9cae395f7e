from __future__ import annotations

from tests.workers.transfer.leaks import nothing_leaks, quick_collection

__all__ = ["nothing_leaks", "quick_collection"]
