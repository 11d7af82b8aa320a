"""What an operator types: whole, shortened as the tables do, or wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.dht.names import as_digest, is_peer_id, is_whole, match_model, match_peer, raw_key, split_key
from azu.dht.text import short_ids
from azu.errors import InputError
from azu.identity import public_key_of
from tests.dht.records import MANIFEST, MODEL, coordinator, identity, offer

PEERS = [identity(number).peer_id for number in range(1, 40)]


@given(st.sampled_from(PEERS), st.sampled_from(["", "…", "..."]))
def test_what_a_table_shows_names_its_peer(peer_id: str, mark: str) -> None:
    shown = short_ids(PEERS)[peer_id]
    assert match_peer(mark + shown.removeprefix("…"), PEERS) == peer_id


def test_whole_ids() -> None:
    assert is_peer_id(PEERS[0])
    assert not is_peer_id(PEERS[0][:-1])
    assert not is_peer_id(PEERS[0][:-1] + "0")  # no digit of base58


@pytest.mark.parametrize(
    "text", ["", "abc", "…", "0OIl", "../../etc", "a b c d", "x" * 52, "\x1b[2Jaaaa", "…\u202eabcd"]
)
def test_what_cannot_be_an_ending(text: str) -> None:
    with pytest.raises(InputError) as refused:
        match_peer(text, PEERS)
    assert refused.value.code in ("bad_peer_id", "unknown_peer")
    assert refused.value.message.isprintable()


def test_endings_that_fit_none_or_several() -> None:
    with pytest.raises(InputError, match="none of the 39 peers") as refused:
        match_peer("aaaaaaaa", PEERS)
    assert refused.value.code == "unknown_peer"
    twins = ["12D3KooW" + letter * 36 + "12345678" for letter in "ABCDEFGHJ"]
    with pytest.raises(InputError, match=r"9 peers .*12345678 and 4 more") as refused:
        match_peer("345678", twins)
    assert refused.value.code == "ambiguous_peer"
    assert match_peer("A12345678", twins) == twins[0]


def test_keys() -> None:
    assert split_key(f"/azu-worker/{PEERS[0]}") == ("azu-worker", PEERS[0])
    assert split_key("/azu-coordinator/…abcd1234") == ("azu-coordinator", "…abcd1234")
    for text in ("/azu-worker", "/azu-worker/", "/pk/x", "azu-worker/x", "//x", "/"):
        with pytest.raises(InputError, match="not the key of a record") as refused:
            split_key(text)
        assert "/azu-worker/<peer id> or /azu-coordinator/<peer id>" in refused.value.remedy


def test_what_the_dht_is_asked_for() -> None:
    for text in (PEERS[0], MANIFEST, MANIFEST.upper(), f"/azu-worker/{PEERS[0]}"):
        assert is_whole(text)
    for text in (PEERS[0][-8:], MANIFEST[:-1], f"/azu-worker/{PEERS[0][-8:]}", "", "!"):
        assert not is_whole(text)
    with pytest.raises(InputError):
        is_whole("/elsewhere/x")
    assert raw_key(f"/azu-worker/{PEERS[0]}") == f"/azu-worker/{PEERS[0]}".encode()
    assert raw_key(MANIFEST) == b"\x12\x20" + bytes.fromhex(MANIFEST)
    assert raw_key(PEERS[0])[-32:] == public_key_of(PEERS[0])


def test_models_by_id_digest_and_beginning() -> None:
    offers = [coordinator(1, offer(), offer(4, "other", "abcdef" + "0" * 58)), coordinator(2, offer())]
    assert match_model(MODEL, offers) == MANIFEST
    assert match_model(MANIFEST[:12], offers) == MANIFEST
    assert match_model("ABABAB", offers) == MANIFEST
    assert match_model("abcdef", offers) == "abcdef" + "0" * 58
    assert as_digest(MANIFEST.upper()) == MANIFEST
    assert as_digest(MANIFEST[:63]) is None
    assert as_digest("g" * 64) is None


def test_models_that_nobody_offers_or_two_do() -> None:
    with pytest.raises(InputError, match="no coordinator here offers 'gpt'") as refused:
        match_model("gpt", [coordinator(1, offer(), offer(1, "\x1b[2J"))])
    assert MODEL in refused.value.remedy
    assert "\x1b" not in str(refused.value)
    with pytest.raises(InputError) as refused:
        match_model("gpt\x1b", [])
    assert "No coordinator offers any model" in refused.value.remedy
    assert "\x1b" not in str(refused.value)
    rivals = [coordinator(1, offer()), coordinator(2, offer(30, MODEL, "cd" * 32))]
    with pytest.raises(InputError, match="stands for 2 manifests") as refused:
        match_model(MODEL, rivals)
    assert refused.value.code == "ambiguous_model"
    for digest in (MANIFEST, "cd" * 32):
        assert digest in refused.value.message
