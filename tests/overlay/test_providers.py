"""A server's provider records: newcomers find room, the dead are forgotten, and an answer is bounded."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from azu.identity import Identity
from azu.overlay import Overlay
from azu.overlay.addresses import parse_peer_id
from azu.overlay.providers import MAX_ADDRESS_BYTES, MAX_NAMED, MAX_OF_KEY, PROVIDER_SECONDS, Providers
from tests.overlay.conftest import LIMIT

ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
KEY, OTHER = b"\x12\x20" + bytes(32), b"\x12\x20" + bytes(31) + b"1"


def peer(number: int, addresses: Sequence[Multiaddr] = (ADDRESS,)) -> PeerInfo:
    return PeerInfo(ID(b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32, "big")), list(addresses))


@pytest.fixture
def store() -> Providers:
    host = types.SimpleNamespace(get_id=lambda: peer(0).peer_id)
    return Providers(ProviderStore(cast(Any, host)))


async def test_the_newest_announcements_stay(store: Providers) -> None:
    for number in range(1, MAX_OF_KEY + 2):
        store.add_provider(KEY, peer(number))
    assert len(store) == MAX_OF_KEY
    store.add_provider(KEY, peer(2))  # it says so again, and is now the last to go
    store.add_provider(KEY, peer(MAX_OF_KEY + 2))
    store.add_provider(OTHER, peer(1))
    known = {str(peer(number).peer_id) for number in (2, *range(4, MAX_OF_KEY + 3))}
    seen: set[str] = set()
    with trio.fail_after(LIMIT):
        while seen != known:
            named = [str(each.peer_id) for each in store.get_providers(KEY)]
            assert len(named) == len(set(named)) == MAX_NAMED
            seen.update(named)
            assert seen <= known
            await trio.lowlevel.checkpoint()
    assert [each.peer_id for each in store.get_providers(OTHER)] == [peer(1).peer_id]


async def test_who_does_not_announce_itself_again_is_forgotten(
    store: Providers, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(1)  # a time of zero is none to upstream
    store.add_provider(KEY, peer(1))
    store.add_provider(OTHER, peer(1))
    store.add_provider(KEY, peer(2))
    await trio.sleep(PROVIDER_SECONDS / 2 + 1)
    store.add_provider(KEY, peer(2))
    await trio.sleep(PROVIDER_SECONDS / 2 + 1)
    assert [each.peer_id for each in store.get_providers(KEY)] == [peer(2).peer_id]
    await trio.sleep(PROVIDER_SECONDS / 2 + 1)
    store.cleanup_expired()
    assert len(store) == store.size() == 0
    assert store.get_providers(KEY) == store.get_providers(OTHER) == []
    assert not store.providers


async def test_room_is_made_by_the_oldest_of_all_keys(store: Providers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.overlay.providers.MAX_ENTRIES", 3)
    for number in range(1, 5):
        store.add_provider(number.to_bytes(34, "big"), peer(number))
    assert len(store) == store.size() == 3
    assert store.get_providers((1).to_bytes(34, "big")) == []


async def test_a_peers_addresses_are_bounded(store: Providers) -> None:
    store.add_provider(KEY, peer(1, [ADDRESS] * 500))
    [named] = store.get_providers(KEY)
    assert 100 < len(named.addrs) * len(ADDRESS.to_bytes()) <= MAX_ADDRESS_BYTES


async def test_a_server_names_more_than_twenty(pair: tuple[Overlay, Overlay]) -> None:
    """Over the wire: the first 20 are all that py-libp2p would know."""
    server, asker = pair
    peers = {Identity((100 + number).to_bytes(32, "big")).peer_id for number in range(40)}
    for each in peers:
        server._dht.service.provider_store.add_provider(KEY, PeerInfo(parse_peer_id(each), [ADDRESS]))
    while set(await asker.providers(KEY[2:], all_holders=True)) != peers:  # it may not know yet what the server speaks
        await trio.sleep(0.02)
