"""python -m bench.experts NAME ...: each name is a module beside this file with a `main(arguments)`."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "block": "bench.experts.block",  # a layer's arithmetic on a CPU, beside transformers
    "placement": "bench.experts.placement",  # placements beside EPLB, a bound and the exact optimum
    "simulate": "bench.experts.simulate",  # live rebalancing against static placement and periodic EPLB
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"python -m bench.experts {{{','.join(COMMANDS)}}} ...")
    import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])
