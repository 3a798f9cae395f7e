"""Placement of experts beside its baselines, its bound and the exact optimum."""

from bench.experts.placement.command import main

__all__ = ["main"]
