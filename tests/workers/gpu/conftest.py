from __future__ import annotations

from tests.workers.models.conftest import one_thread as one_thread
