"""Peers that sent wrong bytes: nothing is fetched from them for a day, whatever the model, over restarts too."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from azu.durable import write_file
from azu.logs import log

__all__ = ["Offenders"]

logger = logging.getLogger(__name__)

# Long enough that a liar gains nothing, and short enough that an honest peer with a bad memory module, or one blamed
# for the fault of ours, comes back by itself.
_FORGIVEN_S = 86_400.0
_MAX_OFFENDERS = 1_024  # a new identity costs nothing, so the list only has to outlast one fetch's peers


class Offenders:
    """The list, and the JSON file that it is kept in: peer id to the unix time of its last offence."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._times = _read(path)

    def add(self, peer_id: str) -> None:
        """Remember a peer. A disk that does not take the list costs its memory over restarts only."""
        self._times.pop(peer_id, None)
        self._times[peer_id] = self._clock()
        while len(self._times) > _MAX_OFFENDERS:
            del self._times[next(iter(self._times))]
        try:
            write_file(self.path, json.dumps(self._times).encode())
        except OSError as error:
            log(logger, logging.WARNING, "offenders cannot be kept", path=self.path, reason=str(error))

    def __contains__(self, peer_id: str) -> bool:
        return 0 <= self._clock() - self._times.get(peer_id, -_FORGIVEN_S) < _FORGIVEN_S


def _read(path: Path) -> dict[str, float]:
    try:
        value = json.loads(path.read_bytes())
        return {str(peer_id): float(at) for peer_id, at in value.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: it is only a memory
        return {}
