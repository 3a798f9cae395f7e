"""Live rebalancing of experts against static placement and periodic EPLB, in simulated time."""

from bench.experts.simulate.command import main

__all__ = ["main"]
