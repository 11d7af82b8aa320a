"""Which coordinators a worker takes orders from."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from azu.logs import log

__all__ = ["Trust"]

logger = logging.getLogger(__name__)


class Trust:
    """Those that the owner named; where none was named, the first whose assignment was followed, until the restart."""

    def __init__(self, named: Iterable[str]) -> None:
        self._named = frozenset(named)
        self._first: str | None = None

    def __call__(self, coordinator: str) -> bool:
        """Whether this worker serves a coordinator."""
        return coordinator in self._named if self._named else self._first in (None, coordinator)

    def serves(self, coordinator: str) -> bool:
        """Whether this worker has chosen a coordinator already: it is named, or was the first."""
        return coordinator in (self._named or {self._first})

    def follow(self, coordinator: str) -> None:
        """Note that an assignment of a trusted coordinator is followed."""
        if not self._named and self._first is None:
            self._first = coordinator
            log(logger, logging.INFO, "serving this coordinator; name it with --trust to keep to it", peer=coordinator)
