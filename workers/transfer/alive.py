"""A word that a sender shares with a receiver: 1 for as long as what was announced stays as it is.

The sender takes it back before it gives the blocks up. A receiver that was slow finds that out after its copy, before
the copy counts.
"""

from __future__ import annotations

import numpy as np

from workers.shared_memory import MappedPages, SharedPages

_PAGE = 4096


class AliveWord:
    def __init__(self) -> None:
        self._page = SharedPages(_PAGE)
        self._words = self._page.array.view(np.uint64)
        self._words[0] = 1

    @property
    def fd(self) -> int:
        """For the receiver."""
        return self._page.fd

    def take_back(self) -> None:
        self._words[0] = 0
        self._page.close()


class SeenWord:
    def __init__(self, fd: int) -> None:
        """Takes the descriptor over. Raises PagesError, OSError."""
        self._words = MappedPages(fd, _PAGE).array.view(np.uint64)

    def check(self) -> None:
        """Raises ConnectionError when it has been taken back."""
        if self._words[0] != 1:
            raise ConnectionError("the sender gave the blocks up while they were copied")
