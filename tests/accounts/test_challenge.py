"""Challenges: only our own, only here, only for a while."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.accounts.challenge import CHALLENGE_LIFE_S, RANDOM_BYTES, Site, check_challenge, make_challenge
from azu.accounts.message import SignInMessage, parse_message
from azu.payments.wallets import Wallet
from azu.tickets import Refusal

SECRET = b"s" * 32
NOW = 1_800_000_000
SITE = Site("azu.example.org", "https://azu.example.org", {"evm": "999"})
BOTH = replace(SITE, chain_ids={"evm": "1", "solana": "mainnet"})
ALICE = Wallet("evm", "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed")
BOB = Wallet("solana", "GwAF45zjfyGzUbd3i3hXxzGeuchzEZXwpRYHZM5912F1")


def challenge(site: Site = SITE, wallet: Wallet = ALICE, random: bytes = bytes(RANDOM_BYTES)) -> SignInMessage:
    return make_challenge(SECRET, site, wallet, NOW, random)


def code(refusal: Refusal | None) -> str | None:
    return refusal and refusal.code


def test_a_challenge_is_good_until_it_expires() -> None:
    message = parse_message(challenge().text())
    assert check_challenge(SECRET, SITE, message, NOW) is None
    assert check_challenge(SECRET, SITE, message, NOW + CHALLENGE_LIFE_S - 1) is None
    assert code(check_challenge(SECRET, SITE, message, NOW + CHALLENGE_LIFE_S)) == "expired_challenge"


def test_it_names_who_asks_whom_and_on_which_chain() -> None:
    message = challenge()
    assert (message.domain, message.uri, message.chain_id) == ("azu.example.org", "https://azu.example.org", "999")
    assert (message.chain, message.address) == ("Ethereum", ALICE.address)
    other = challenge(BOTH, BOB)
    assert (other.chain, other.address, other.chain_id) == ("Solana", BOB.address, "mainnet")
    assert check_challenge(SECRET, BOTH, other, NOW) is None


def test_no_two_are_alike() -> None:
    assert challenge(random=b"\1" * RANDOM_BYTES).nonce != challenge(random=b"\2" * RANDOM_BYTES).nonce


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (replace(SITE, domain="evil.example"), "wrong_domain"),
        (replace(SITE, uri="https://azu.example.org/other"), "wrong_domain"),
        (replace(SITE, chain_ids={"evm": "998"}), "wrong_chain"),
        (replace(SITE, chain_ids={"solana": "999"}), "wrong_chain"),
    ],
)
def test_a_challenge_of_elsewhere_is_refused(site: Site, expected: str) -> None:
    assert code(check_challenge(SECRET, site, challenge(), NOW)) == expected


def test_a_challenge_of_another_secret_is_unknown() -> None:
    assert code(check_challenge(b"t" * 32, SITE, challenge(), NOW)) == "unknown_challenge"


@given(st.sampled_from(["address", "statement", "nonce", "issued_at", "expires_at"]), st.data())
def test_whatever_is_changed_in_it_shows(name: str, data: st.DataObject) -> None:
    message = challenge()
    before = getattr(message, name)
    if isinstance(before, int):
        changed: object = before + data.draw(st.integers(1, 10**6))
    else:
        place = data.draw(st.integers(0, len(before) - 1))
        changed = before[:place] + ("a" if before[place] != "a" else "b") + before[place + 1 :]
    forged = replace(message, **{name: changed})
    assert code(check_challenge(SECRET, SITE, forged, NOW)) == "unknown_challenge"
