"""Records and providers in the Kademlia DHT.

Values live under /<namespace>/<name>. Each namespace has a `RecordValidator`; keys of other namespaces, values over
`MAX_RECORD_BYTES` and values that fail validation are neither stored, nor sent, nor returned, here or in the server.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.records.validator import NamespacedValidator, Validator
from multiaddr import Multiaddr

from azu.errors import AzuError, InputError, NetworkError, TrustError
from azu.overlay._patches import AzuKadDHT
from azu.overlay.addresses import peer_id_of
from azu.overlay.faults import mapped
from azu.overlay.lookup import K, Lookup, Trace
from azu.overlay.nat.messages import framed, read_message
from azu.overlay.negotiate import negotiate
from azu.overlay.providers import Providers
from azu.overlay.streams import OverlayStream

__all__ = ["MAX_RECORD_BYTES", "Dht", "RecordValidator"]

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 16 * 1024  # per value; a worker record has a few hundred bytes
MAX_KEY_BYTES = 128  # go-libp2p's bound
MAX_RECORDS = 8192  # values a server keeps: 128 MiB at worst
STORE_SECONDS = 15.0  # a put or a provide, all peers together
PLACES_SECONDS = 60.0  # how long a record that is refreshed goes to the same peers, without a look-up for each refresh
MAX_PLACES = 64  # keys for which those are remembered; a node puts one or two of its own
KAD = str(PROTOCOL_ID)
QUORUM = 5  # peers with a record or providers, after which a look-up ends: they are on several disjoint paths
MAX_ANSWER_BYTES = 1 << 20  # 20 peers and some 100 providers, each with its addresses and its signed peer record
MAX_PROVIDERS = 1_000  # of one answer
MAX_ADDRESSES, MAX_ADDRESS_BYTES = 16, 256  # of one peer in an answer
ADDRESS_SECONDS = 3600  # how long they are remembered
STRAGGLER_SECONDS = 3.0  # how long get and providers wait for slow peers once somebody has answered
ECHO_SECONDS = 2.0  # how long an announcement waits for its echo; a peer with too much to do resets the stream
PROVIDES_PER_WINDOW, PROVIDE_WINDOW = 8, 10.5  # a py-libp2p server drops more than 10 per 10 s (trap 9)
PEERS_PER_SUBNET = 2  # of one /16 (IPv6: /32) in a bucket
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
        self._swarm: Any = host.get_network()
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
        self.service.provider_store = Providers(self.service.provider_store)
        self._places: dict[bytes, tuple[float, list[ID]]] = {}  # until when, and the peers that took the last value
        self._provided: deque[float] = deque(maxlen=PROVIDES_PER_WINDOW)
        self._provide_turn = trio.Lock()

    def table_size(self) -> int:
        """Peers in the routing table."""
        size: int = self.service.get_routing_table_size()
        return size

    def is_neighbour(self, peer_id: ID) -> bool:
        """Whether a peer is in the routing table."""
        found: bool = self.service.routing_table.peer_in_table(peer_id)
        return found

    @property
    def record_count(self) -> int:
        """Values stored here."""
        return len(self.service.value_store.store)

    @property
    def provided_count(self) -> int:
        """Keys whose providers are stored here."""
        return len(self.service.provider_store.providers)

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

        until, places = self._places.pop(raw, (0.0, []))
        with trio.move_on_after(STORE_SECONDS):
            if trio.current_time() < until:
                await _each(store, places)
            if len(stored) <= len(places) // 2:  # most of them are gone, or there are none yet
                until = trio.current_time() + PLACES_SECONDS
                await _each(store, [peer for peer in await self._closest(raw) if peer not in stored])
        if len(stored) >= K // 2 and len(self._places) < MAX_PLACES:  # in a smaller swarm a look-up costs little
            self._places[raw] = until, stored
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
        values: list[bytes] = []

        async def ask(peer: ID) -> list[ID]:
            answer = await self._query(peer, Message.GET_VALUE, raw)
            if answer.HasField("record") and adapter._acceptable(key, answer.record.value):
                values.append(answer.record.value)
            return self._named(answer)

        await self._search(raw, ask, timeout, lambda: len(values))
        held = self.service.value_store.get(raw)
        if held is not None and adapter._acceptable(key, bytes(held.value)):
            values.append(bytes(held.value))
        return values[adapter.select(key, values)] if values else None

    async def provide(self, key: bytes) -> None:
        """Announce that this node serves the content with this digest; see Overlay.provide."""
        content = _content_key(key)
        store = self.service.provider_store
        async with self._provide_turn:
            if len(self._provided) == PROVIDES_PER_WINDOW:
                await trio.sleep_until(self._provided[0] + PROVIDE_WINDOW)
            self._provided.append(trio.current_time())
        host = self._host
        store.add_provider(content, PeerInfo(host.get_id(), host.get_addrs()))
        announcement = framed(self._announcement(content))
        told: list[ID] = []

        async def tell(peer: ID) -> None:
            async with OverlayStream(await negotiate(self._swarm, peer, KAD, announcement), str(peer), KAD) as stream:
                with trio.move_on_after(ECHO_SECONDS):  # nobody has to answer
                    await read_message(stream, Message, limit=MAX_ANSWER_BYTES)
            told.append(peer)

        with mapped("announce content"), trio.move_on_after(STORE_SECONDS):
            await _each(tell, await self._closest(content))
        if not told:
            raise NetworkError(
                "no peer took the provider announcement",
                code="not_stored",
                remedy="Check that this node is connected to a bootstrap node",
            )

    def _announcement(self, content: bytes) -> Message:
        """That this node provides it, with its addresses and its signed peer record."""
        host = self._host
        signed, _ = env_to_send_in_RPC(host)
        addresses = [each.to_bytes() for each in host.get_addrs()]
        me = Message.Peer(id=host.get_id().to_bytes(), addrs=addresses, signedRecord=signed)
        return Message(type=Message.ADD_PROVIDER, key=content, senderRecord=signed, providerPeers=[me])

    async def providers(self, key: bytes, timeout: float, *, all_holders: bool) -> tuple[str, ...]:
        """Peers that announced this digest, deduplicated; see Overlay.providers."""
        content = _content_key(key)
        found: dict[str, None] = {}

        answers = 0

        async def ask(peer: ID) -> list[ID]:
            nonlocal answers
            answer = await self._query(peer, Message.GET_PROVIDERS, content)
            providers = self._learn(answer.providerPeers[:MAX_PROVIDERS])
            found.update(dict.fromkeys(map(str, providers)))
            answers += bool(providers)
            return self._named(answer)

        self._note(self.service.provider_store.get_providers(content), found)
        await self._search(content, ask, timeout, lambda: 0 if all_holders else answers)
        found.pop(str(self._host.get_id()), None)
        return tuple(found)

    def _note(self, infos: Iterable[Any], found: dict[str, None]) -> None:
        for info in infos:
            found.setdefault(str(info.peer_id))
            if info.addrs and info.peer_id != self._host.get_id():
                self._host.get_peerstore().add_addrs(info.peer_id, info.addrs[:16], 3600)

    async def trace(self, key: bytes, timeout: float, seeds: Sequence[ID] | None = None) -> Trace:
        """Look for the peers closest to a key; see Overlay.trace."""
        ask = partial(self._find_node, key)
        lookup = self._lookup(key, ask) if seeds is None else Lookup(key, self._host.get_id(), seeds, ask)
        with mapped("query the DHT"), trio.move_on_after(timeout):
            await lookup.run()
        return lookup.trace

    async def _search(
        self, raw: bytes, ask: Callable[[ID], Awaitable[list[ID]]], timeout: float, answers: Callable[[], int]
    ) -> None:
        """Look up until QUORUM peers had something; once one had, wait no longer than STRAGGLER_SECONDS for others."""
        with mapped("query the DHT"), trio.move_on_after(timeout) as scope:

            async def ask_and_hurry(peer: ID) -> list[ID]:
                named = await ask(peer)
                if answers():
                    scope.deadline = min(scope.deadline, trio.current_time() + STRAGGLER_SECONDS)
                return named

            await self._lookup(raw, ask_and_hurry, lambda: answers() >= QUORUM).run()

    async def _closest(self, raw: bytes) -> list[ID]:
        lookup = self._lookup(raw, partial(self._find_node, raw))
        await lookup.run()
        return lookup.closest

    def _lookup(
        self, raw: bytes, ask: Callable[[ID], Awaitable[list[ID]]], enough: Callable[[], bool] = lambda: False
    ) -> Lookup:
        seeds = self.service.routing_table.find_local_closest_peers(raw, K)
        if len(seeds) < K:  # a client that has just come knows few servers, and whom it is connected to
            seeds += [peer for peer in self._host.get_connected_peers() if KAD in self._swarm.protocols_of(peer)]
        return Lookup(raw, self._host.get_id(), seeds, ask, enough)

    async def _find_node(self, raw: bytes, peer: ID) -> list[ID]:
        return self._named(await self._query(peer, Message.FIND_NODE, raw))

    async def _query(self, peer: ID, kind: Any, raw: bytes) -> Message:
        question = framed(Message(type=kind, key=raw))
        async with OverlayStream(await negotiate(self._swarm, peer, KAD, question), str(peer), KAD) as stream:
            answer = await read_message(stream, Message, limit=MAX_ANSWER_BYTES)
        if not self.service.routing_table.peer_in_table(peer):
            self.service.manager.run_task(self.service.add_peer, peer)
        return answer

    def _named(self, answer: Message) -> list[ID]:
        return self._learn(answer.closerPeers[:K])

    def _learn(self, peers: Iterable[Message.Peer]) -> list[ID]:
        """Those of the peers in an answer that can be dialled; their addresses are remembered."""
        learned: list[ID] = []
        for each in peers:
            try:
                peer_id = peer_id_of(each.id)
                addresses = [Multiaddr(raw) for raw in each.addrs[:MAX_ADDRESSES] if len(raw) <= MAX_ADDRESS_BYTES]
            except Exception as error:  # a stranger's bytes; py-multiaddr raises a dozen types
                logger.debug("a peer in a DHT answer: %r", error)
                continue
            if peer_id == self._host.get_id():
                continue
            if addresses:
                self._host.get_peerstore().add_addrs(peer_id, addresses, ADDRESS_SECONDS)
            if addresses or _known(self._host, peer_id):
                learned.append(peer_id)
        return learned

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
