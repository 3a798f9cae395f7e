"""One worker by hand, without Ray:

python -m workers CONFIG.json        a WorkerConfig as JSON; prints its address; SIGTERM stops it
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path

from workers.config import WorkerConfig
from workers.environment import limit_libraries
from workers.garbage import spare_steps


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m workers CONFIG.json\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = WorkerConfig.model_validate_json(Path(arguments[0]).read_text())
    limit_libraries(config.engine.num_threads)
    from workers.worker import open_worker  # only now: it loads torch

    worker = open_worker(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # while the model loads there is nothing to take back
    info = worker.start()
    spare_steps()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=worker.stop).start())
    sys.stdout.write(f"{info.address}\n")
    sys.stdout.flush()
    worker.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
