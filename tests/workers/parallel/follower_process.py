"""A rank behind the first as a process:  python -m tests.workers.parallel.follower_process SETTINGS

SETTINGS: what `config_of` takes, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.workers.parallel.teams import config_of
from workers.parallel.follower import Follower


def main(settings: str) -> None:
    named = json.loads(settings)
    follower = Follower(config_of(Path(named.pop("model")), **named))
    follower.start()
    follower.wait()


if __name__ == "__main__":
    main(sys.argv[1])
