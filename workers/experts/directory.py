"""Where ranks of a group that don't know each other yet find each other."""

from __future__ import annotations

from typing import Protocol

from workers.experts.messages import Member


class Directory(Protocol):
    def enter(self, member: Member) -> None:
        """In the place of earlier lives of that rank."""

    def read(self) -> list[Member]:
        """Whoever has entered, dead or alive."""
