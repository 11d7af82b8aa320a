"""The peers that a node remembers on disk, so that it finds its swarm again without a bootstrap node."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azu.durable import write_file
from azu.errors import InputError
from azu.logs import log
from azu.operator_input import check_peer_address

__all__ = ["PeerBook"]

logger = logging.getLogger(__name__)

_MAX_PEERS = 200  # remembered; the ones seen last
_MAX_ADDRESSES = 4  # of each
_MAX_BYTES = 1 << 20  # of the file
_KEPT_S = 30 * 86_400.0  # who was not seen for longer is forgotten
_CHANCE = random.SystemRandom()


class PeerBook:
    """Peer ids with the multiaddrs at which they were connected, and when. What is in the file is only tried: whoever
    answers there still has to prove its peer id.

    Args:
        path: a JSON file; absent at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peers = _read(path)

    def __len__(self) -> int:
        return len(self._peers)

    def sample(self, count: int) -> list[str]:
        """Full multiaddrs of up to `count` peers, chosen by chance: so no peer can make itself everybody's first."""
        chosen = _CHANCE.sample(list(self._peers), min(count, len(self._peers)))
        return [address for peer_id in chosen for address in self._peers[peer_id][1]]

    def note(self, peers: Mapping[str, Sequence[str]]) -> None:
        """Remember these as seen now: peer id to full multiaddrs. A disk that does not take them costs only the memory
        over restarts.
        """
        now = time.time()
        before = {peer_id: addresses for peer_id, (_, addresses) in self._peers.items()}
        for peer_id, addresses in peers.items():
            if addresses:
                self._peers[peer_id] = (now, list(addresses)[:_MAX_ADDRESSES])
        newest = sorted(self._peers, key=lambda peer_id: self._peers[peer_id][0], reverse=True)[:_MAX_PEERS]
        self._peers = {peer_id: self._peers[peer_id] for peer_id in newest}
        if {peer_id: addresses for peer_id, (_, addresses) in self._peers.items()} != before:
            self.save()

    def save(self) -> None:
        """Write the file."""
        try:
            write_file(self._path, json.dumps(self._peers).encode())
        except OSError as error:
            log(logger, logging.WARNING, "peers cannot be remembered", path=self._path, reason=str(error))


def _read(path: Path) -> dict[str, tuple[float, list[str]]]:
    """What the file says, as far as it makes sense."""
    try:
        with path.open("rb") as file:
            value: Any = json.loads(file.read(_MAX_BYTES))
        entries = [(str(peer_id), float(seen), list(addresses)) for peer_id, (seen, addresses) in value.items()]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log(logger, logging.WARNING, "remembered peers are damaged and left out", path=path, reason=str(error))
        return {}
    oldest = time.time() - _KEPT_S
    good = {
        peer_id: (seen, [each for each in addresses[:_MAX_ADDRESSES] if _is_address_of(each, peer_id)])
        for peer_id, seen, addresses in entries[:_MAX_PEERS]
        if seen >= oldest
    }
    return {peer_id: entry for peer_id, entry in good.items() if entry[1]}


def _is_address_of(address: object, peer_id: str) -> bool:
    try:
        return isinstance(address, str) and check_peer_address(address).endswith(f"/p2p/{peer_id}")
    except InputError:
        return False
