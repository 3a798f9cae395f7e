"""`headrace serve` with fakes inside its processes:  python -m tests.cluster.serve_fake [--set NAME=VALUE ...]"""

from __future__ import annotations

import sys

from cluster.config import load_config
from cluster.config_source import parse_setting
from cluster.foreground import Foreground, ServeError
from tests.cluster.fake_parts import fake_parts


def main(settings: list[str]) -> int:
    overrides = {"router.http.port": 0, "router.grpc.port": 0, "model.name": "fake"}
    try:
        Foreground(load_config(None, overrides | dict(map(parse_setting, settings))), fake_parts()).serve()
    except ServeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
