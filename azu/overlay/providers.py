"""Who announced what: a DHT server's provider records, in place of py-libp2p's.

Upstream keeps the first 20 peers of a key for 48 hours: the 21st worker of a swarm is announced to nobody, and the dead
keep the places of the living. Here the newest announcements stay; the living repeat theirs every `ANNOUNCE_SECONDS`,
and who does not is forgotten after `PROVIDER_SECONDS`.
"""

from __future__ import annotations

from random import SystemRandom

import trio
from libp2p.kad_dht.provider_store import ProviderRecord, ProviderStore
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

__all__ = ["ANNOUNCE_SECONDS", "PROVIDER_SECONDS", "Providers"]

ANNOUNCE_SECONDS = 120.0  # also to nodes that have come since
PROVIDER_SECONDS = 300.0
MAX_ENTRIES = 65_536  # of all keys together
MAX_OF_KEY = 1_024
# Peers in one answer, picked by chance: a key's holders are asked again and again, and so name all of them in time.
MAX_NAMED = 100
MAX_ADDRESS_BYTES = 1_024  # of one peer

_chance = SystemRandom()


class Providers(ProviderStore):
    """Provider records by key. Where there is no room, who announced itself longest ago makes room."""

    def __init__(self, upstream: ProviderStore) -> None:
        super().__init__(upstream.host, upstream.peer_routing)
        self._entries: dict[tuple[bytes, str], None] = {}  # of all keys, the oldest announcement first

    def __len__(self) -> int:
        return len(self._entries)

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Note an announcement, in place of the peer's earlier one."""
        peer_id = str(provider.peer_id)
        self._forget(key, peer_id)
        self._forget_expired()
        of_key = self.providers.get(key, {})
        if len(of_key) >= MAX_OF_KEY:
            self._forget(key, next(iter(of_key)))
        if len(self._entries) >= MAX_ENTRIES:
            self._forget(*next(iter(self._entries)))
        info = PeerInfo(provider.peer_id, _bounded(provider.addrs))
        self.providers.setdefault(key, {})[peer_id] = ProviderRecord(info, trio.current_time())
        self._entries[key, peer_id] = None

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Peers that announced the key, `MAX_NAMED` at most."""
        self._forget_expired()
        known = list(self.providers.get(key, {}).values())
        named = known if len(known) <= MAX_NAMED else _chance.sample(known, MAX_NAMED)
        return [record.provider_info for record in named]

    def cleanup_expired(self) -> None:
        """Called by upstream now and then."""
        self._forget_expired()

    def _forget_expired(self) -> None:
        before = trio.current_time() - PROVIDER_SECONDS
        while self._entries:
            key, peer_id = next(iter(self._entries))
            if self.providers[key][peer_id].timestamp > before:
                return
            self._forget(key, peer_id)

    def _forget(self, key: bytes, peer_id: str) -> None:
        if (key, peer_id) in self._entries:
            del self._entries[key, peer_id]
            del self.providers[key][peer_id]
            if not self.providers[key]:
                del self.providers[key]


def _bounded(addresses: list[Multiaddr]) -> list[Multiaddr]:
    """The first of them, as far as they fit."""
    kept, size = [], 0
    for each in addresses:
        size += len(each.to_bytes())
        if size > MAX_ADDRESS_BYTES:
            break
        kept.append(each)
    return kept
