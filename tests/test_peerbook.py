"""What a node remembers of its peers over restarts, and what a damaged or hostile file does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azu.identity import Identity
from azu.peerbook import PeerBook

PEER = Identity(b"p" * 32).peer_id
LATER = 4e9  # unix seconds
ADDRESS = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}"


def test_what_was_seen_is_there_after_a_restart(tmp_path: Path) -> None:
    PeerBook(tmp_path / "peers.json").note({PEER: [ADDRESS]})
    book = PeerBook(tmp_path / "peers.json")
    assert len(book) == 1
    assert book.sample(8) == [ADDRESS]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    book = PeerBook(tmp_path / "peers.json")
    ids = [Identity(number.to_bytes(32)).peer_id for number in range(1, 301)]
    for peer_id in ids:
        book.note({peer_id: [f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id}"]})
    assert len(book) == len(PeerBook(tmp_path / "peers.json")) == 200
    assert {address.rsplit("/", 1)[1] for address in book.sample(200)} == set(ids[100:])


def test_a_peer_without_an_address_is_not_remembered(tmp_path: Path) -> None:
    book = PeerBook(tmp_path / "peers.json")
    book.note({PEER: []})
    assert not book


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        json.dumps({PEER: 1}).encode(),
        json.dumps({PEER: [LATER, ["/ip4/203.0.113.7/tcp/4001"]]}).encode(),
        json.dumps({PEER: [LATER, [f"/ip4/203.0.113.7/tcp/4001/p2p/{Identity(b'o' * 32).peer_id}"]]}).encode(),
        json.dumps({PEER: [LATER, [7, None, {}]]}).encode(),
        json.dumps({PEER: [0, [ADDRESS]]}).encode(),
    ],
)
def test_a_damaged_file_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "peers.json").write_bytes(content)
    book = PeerBook(tmp_path / "peers.json")
    assert not book
    book.note({PEER: [ADDRESS]})
    assert PeerBook(tmp_path / "peers.json").sample(1) == [ADDRESS]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.just(ADDRESS) | st.just(PEER),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just(PEER), inner, max_size=4),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=JSON)
def test_any_json_is_survived(tmp_path: Path, value: object) -> None:
    (tmp_path / "peers.json").write_text(json.dumps(value))
    for address in PeerBook(tmp_path / "peers.json").sample(10):
        assert address == ADDRESS
