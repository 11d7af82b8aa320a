"""Records and providers in the Kademlia DHT.

Values live under /<namespace>/<name>. Each namespace has a `RecordValidator`; keys of other namespaces, values over
`MAX_RECORD_BYTES` and values that fail validation are neither stored, nor sent, nor returned, here or in the server.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from azu.errors import AzuError, InputError, NetworkError, TrustError
from azu.overlay._patches import AzuKadDHT
from azu.overlay.faults import mapped

__all__ = ["MAX_RECORD_BYTES", "Dht", "RecordValidator"]

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 16 * 1024  # per value; a worker record has a few hundred bytes
MAX_KEY_BYTES = 128  # go-libp2p's bound
MAX_RECORDS = 8192  # values a server keeps: 128 MiB at worst
MAX_PROVIDED_KEYS = 65_536  # keys whose providers a server keeps
STORE_SECONDS = 15.0  # a put or a provide, all peers together
STRAGGLER_SECONDS = 3.0  # how long get and providers wait for slow peers once somebody has answered
PROVIDES_PER_WINDOW, PROVIDE_WINDOW = 8, 10.5  # a py-libp2p server drops more than 10 per 10 s (trap 9)
PEERS_PER_SUBNET = 20  # upstream's 2 would keep most of a data centre out of each bucket; records are signed anyway
PARALLEL = 10  # queries in flight per call


class RecordValidator(Protocol):
    """Pure. Decides which DHT values under /<namespace>/... are acceptable."""

    def validate(self, key: str, value: bytes) -> None:
        """Raise azu.errors.TrustError or ProtocolError if `value` is unacceptable under `key`."""

    def select(self, key: str, values: Sequence[bytes]) -> int:
        """The index of the best (newest) of several acceptable values."""


class _Adapter(Validator):
    """Shows an azu validator to libp2p, with our bounds in front of it."""

    def __init__(self, inner: RecordValidator, has_room: Callable[[str], bool]) -> None:
        self._inner = inner
        self._has_room = has_room

    def validate(self, key: str, value: bytes) -> None:
        if len(value) > MAX_RECORD_BYTES or len(key.encode()) > MAX_KEY_BYTES:
            raise TrustError(f"the record {key[:60]!r} is too large ({len(value)} bytes)", code="record_too_large")
        if not self._has_room(key):
            raise TrustError("this node's record store is full", code="store_full")
        self._inner.validate(key, value)

    def select(self, key: str, values: Sequence[bytes]) -> int:
        """The best of those that (still) validate; among equals the last, so that a server takes a renewal."""
        good = [index for index, value in enumerate(values) if self._acceptable(key, value)]
        if not good:
            raise TrustError(f"no acceptable value for {key!r}")
        best = values[good[self._inner.select(key, [values[index] for index in good])]]
        return max(index for index in good if values[index] == best)

    def _acceptable(self, key: str, value: bytes) -> bool:
        try:
            self.validate(key, value)
        except Exception:  # whatever a validator raises on a stranger's bytes, they are not acceptable
            return False
        return True


class Dht:
    """The DHT side of an overlay. `service` must be run by the owner; see host.py."""

    def __init__(self, host: IHost, *, server: bool, validators: Mapping[str, RecordValidator]) -> None:
        self._host = host
        self._adapters = {name: _Adapter(each, self._has_room) for name, each in validators.items()}
        chosen: dict[str, Validator] = dict(self._adapters)
        self.service: Any = AzuKadDHT(
            host,
            DHTMode.SERVER if server else DHTMode.CLIENT,
            validator=NamespacedValidator(chosen, strict_validation=True),
            validator_changed=True,  # else upstream adds /pk and /ipns
            strict_validation=True,
            max_peers_per_subnet=PEERS_PER_SUBNET,
        )
        self._bound_providers()
        self._provided: deque[float] = deque(maxlen=PROVIDES_PER_WINDOW)
        self._provide_turn = trio.Lock()

    def table_size(self) -> int:
        """Peers in the routing table."""
        size: int = self.service.get_routing_table_size()
        return size

    async def add_peer(self, peer_id: ID) -> None:
        """Enter a connected peer into the routing table, which nothing else does (trap 10)."""
        await self.service.add_peer(peer_id)

    async def refresh(self) -> None:
        """Look ourselves up, so that the table fills with neighbours."""
        with mapped("refresh the routing table"):
            await self.service.refresh_routing_table()

    async def find_addresses(self, peer_id: ID) -> list[Multiaddr]:
        """Ask the network where a peer is."""
        with mapped(f"find {peer_id}"):
            await self._closest(peer_id.to_bytes())
            return _known(self._host, peer_id)

    async def put_record(self, key: str, value: bytes) -> None:
        """Store a value here and at the peers closest to its key; see Overlay.put_record."""
        adapter = self._adapter(key)
        adapter.validate(key, value)
        raw = key.encode()
        held = self.service.value_store.get(raw)
        if held is not None and held.value != value and adapter.select(key, [held.value, value]) == 0:
            raise InputError(
                f"a newer record {key} is stored already", code="stale_record", remedy="Raise its sequence number"
            )
        self.service.value_store.put(raw, value)
        stored: list[ID] = []

        async def store(peer: ID) -> None:
            if await self.service.value_store._store_at_peer(peer, raw, value):
                stored.append(peer)

        with trio.move_on_after(STORE_SECONDS):
            await _each(store, await self._closest(raw))
        if not stored:
            raise NetworkError(
                f"no peer stored the record {key}",
                code="not_stored",
                remedy="Check that this node is connected to a bootstrap node",
            )

    async def get_record(self, key: str, timeout: float) -> bytes | None:
        """The best value the network and this node know; see Overlay.get_record."""
        adapter = self._adapter(key)
        raw = key.encode()
        answers: dict[ID, bytes | None] = {}

        async def ask(peer: ID) -> None:
            record, _closer = await self.service.value_store._get_from_peer(
                peer, raw, return_record=True, return_closer_peers=True
            )
            value = None if record is None else bytes(record.value)
            answers[peer] = value if value is not None and adapter._acceptable(key, value) else None

        await self._gather(ask, raw, timeout, lambda: any(each is not None for each in answers.values()))
        held = self.service.value_store.get(raw)
        values = [each for each in answers.values() if each is not None]
        if held is not None and adapter._acceptable(key, bytes(held.value)):
            values.append(bytes(held.value))
        return values[adapter.select(key, values)] if values else None

    async def provide(self, key: bytes) -> None:
        """Announce that this node serves the content with this digest; see Overlay.provide."""
        content = _content_key(key)
        store = self.service.provider_store
        async with self._provide_turn:
            if len(self._provided) == PROVIDES_PER_WINDOW:
                await trio.sleep(self._provided[0] + PROVIDE_WINDOW - trio.current_time())
            self._provided.append(trio.current_time())
        done = False
        with mapped("announce content"), trio.move_on_after(STORE_SECONDS):
            done = await store.provide(content)
        store._last_republish[content] = time.time()  # upstream's maintenance would send all of them at once
        if not done:
            raise NetworkError(
                "no peer took the provider announcement",
                code="not_stored",
                remedy="Check that this node is connected to a bootstrap node",
            )

    async def providers(self, key: bytes, timeout: float) -> tuple[str, ...]:
        """Peers that announced this digest, deduplicated; see Overlay.providers."""
        content = _content_key(key)
        found: dict[str, None] = {}

        async def ask(peer: ID) -> None:
            infos, _ = await self.service.provider_store._get_providers_from_peer_with_closers(peer, content)
            self._note(infos, found)

        self._note(self.service.provider_store.get_providers(content), found)
        await self._gather(ask, content, timeout, lambda: bool(found))
        found.pop(str(self._host.get_id()), None)
        return tuple(found)

    def _note(self, infos: Iterable[Any], found: dict[str, None]) -> None:
        for info in infos:
            found.setdefault(str(info.peer_id))
            if info.addrs and info.peer_id != self._host.get_id():
                self._host.get_peerstore().add_addrs(info.peer_id, info.addrs[:16], 3600)

    async def _gather(
        self, ask: Callable[[ID], Awaitable[None]], raw: bytes, timeout: float, enough: Callable[[], bool]
    ) -> None:
        """Ask the closest peers all at once; once `enough`, wait no longer than STRAGGLER_SECONDS for the rest."""
        with mapped("query the DHT"), trio.move_on_after(timeout) as scope:

            async def ask_and_hurry(peer: ID) -> None:
                await ask(peer)
                if enough():
                    scope.deadline = min(scope.deadline, trio.current_time() + STRAGGLER_SECONDS)

            await _each(ask_and_hurry, await self._closest(raw))

    async def _closest(self, raw: bytes) -> list[ID]:
        peers: list[ID] = await self.service.peer_routing.find_closest_peers_network(raw)
        return [peer for peer in peers if peer != self._host.get_id()]

    def _adapter(self, key: str) -> _Adapter:
        parts = key.split("/", 2)
        if len(parts) == 3 and not parts[0] and parts[1] in self._adapters:
            return self._adapters[parts[1]]
        raise InputError(
            f"{key[:60]!r} is in no namespace of this node",
            code="bad_record_key",
            remedy=f"Keys are /<namespace>/<name>; namespaces here: {', '.join(self._adapters) or 'none'}",
        )

    def _has_room(self, key: str) -> bool:
        store = self.service.value_store.store
        return len(store) < MAX_RECORDS or key.encode() in store

    def _bound_providers(self) -> None:
        """Upstream bounds the providers of a key, but not the keys."""
        store = self.service.provider_store
        upstream = store.add_provider

        def add_provider(key: bytes, provider: Any) -> None:
            if key in store.providers or len(store.providers) < MAX_PROVIDED_KEYS:
                upstream(key, provider)

        store.add_provider = add_provider


async def _each(ask: Callable[[ID], Awaitable[None]], peers: Sequence[ID]) -> None:
    limit = trio.CapacityLimiter(PARALLEL)

    async def one(peer: ID) -> None:
        async with limit:
            try:
                await ask(peer)
            except AzuError as error:
                logger.debug("DHT query to %s: %s", peer, error)
            except Exception as error:  # one peer's answer, or libp2p's trouble with it, concerns nobody else
                logger.debug("DHT query to %s: %r", peer, error)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(one, peer)


def _content_key(digest: bytes) -> bytes:
    if len(digest) != hashlib.sha256().digest_size:
        raise InputError(f"a content key is a SHA-256 digest of 32 bytes, not {len(digest)}", code="bad_content_key")
    return b"\x12\x20" + digest  # multihash: sha2-256, 32 bytes


def _known(host: IHost, peer_id: ID) -> list[Multiaddr]:
    try:
        return list(host.get_peerstore().addrs(peer_id))
    except Exception:  # PeerStoreError: nothing known, or expired
        return []
