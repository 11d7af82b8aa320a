"""The text that wallets sign: one spelling, read back exactly, and nothing else is read at all."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.accounts.message import MAX_MESSAGE_CHARS, SignInMessage, parse_message
from azu.errors import InputError

EVM = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
SOLANA = "GwAF45zjfyGzUbd3i3hXxzGeuchzEZXwpRYHZM5912F1"
MESSAGE = SignInMessage(
    domain="azu.example.org",
    chain="Ethereum",
    address=EVM,
    statement="I want a key.",
    uri="https://azu.example.org",
    chain_id="999",
    nonce="32891757aZ",
    issued_at=1_633_015_524,
    expires_at=1_633_016_124,
)
# EIP-4361's own example of the layout, with azu's fields.
TEXT = """\
azu.example.org wants you to sign in with your Ethereum account:
0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed

I want a key.

URI: https://azu.example.org
Version: 1
Chain ID: 999
Nonce: 32891757aZ
Issued At: 2021-09-30T15:25:24Z
Expiration Time: 2021-09-30T15:35:24Z"""

visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
times = st.integers(0, 253_402_300_799)  # up to the year 9999


@st.composite
def messages(draw: st.DrawFn) -> SignInMessage:
    chain: Literal["Ethereum", "Solana"] = draw(st.sampled_from(["Ethereum", "Solana"]))
    return SignInMessage(
        domain=draw(st.text(visible, min_size=1, max_size=255)),
        chain=chain,
        address=draw(st.text(string.ascii_letters + string.digits, min_size=32, max_size=44)),
        statement=draw(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=300)),
        uri=draw(st.text(visible, min_size=1, max_size=1024)),
        chain_id=draw(st.text(string.ascii_letters + string.digits + ":_-", min_size=1, max_size=64)),
        nonce=draw(st.text(string.ascii_letters + string.digits, min_size=8, max_size=128)),
        issued_at=draw(times),
        expires_at=draw(times),
    )


def is_read(text: str) -> bool:
    try:
        parse_message(text)
    except InputError as error:
        return error.code != "bad_message"
    return True


def test_the_text_is_laid_out_as_the_standards_have_it() -> None:
    assert MESSAGE.text() == TEXT
    solana = replace(MESSAGE, chain="Solana", address=SOLANA)
    assert solana.text().splitlines()[:2] == [
        "azu.example.org wants you to sign in with your Solana account:",
        SOLANA,
    ]


@given(messages())
def test_what_is_written_is_read_back(message: SignInMessage) -> None:
    assert parse_message(message.text()) == message
    assert len(message.text()) <= MAX_MESSAGE_CHARS


@given(st.text() | st.text(st.sampled_from(TEXT)))
def test_any_other_text_is_refused_without_a_fault(text: str) -> None:
    is_read(text)


@given(st.data())
def test_a_text_with_a_change_is_read_as_what_it_says_or_not_at_all(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(TEXT)))
    length = data.draw(st.integers(0, 3))
    changed = TEXT[:place] + data.draw(st.text(max_size=3)) + TEXT[place + length :]
    if is_read(changed):
        assert parse_message(changed).text() == changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n", "\r\n"),
        ("Version: 1", "Version: 2"),
        ("Version: 1", "Version:  1"),
        ("Nonce: 32891757aZ", "Nonce: short"),
        ("Nonce: 32891757aZ", "Nonce: 32891757a-"),
        ("15:25:24Z", "15:25:24+00:00"),
        ("15:25:24Z", "15:25:24.000Z"),
        ("2021-09-30T15:25:24Z", "2021-02-30T15:25:24Z"),
        ("2021", "\uff12\uff10\uff12\uff11"),
        ("Ethereum", "Bitcoin"),
        ("I want a key.", "I want a key.\nI want two."),
        ("I want a key.\n\n", ""),
        ("Expiration Time: 2021-09-30T15:35:24Z", "Expiration Time: 2021-09-30T15:35:24Z\n"),
        ("Expiration Time: 2021-09-30T15:35:24Z", "Expiration Time: 2021-09-30T15:35:24Z\nRequest ID: 1"),
        ("\nExpiration Time: 2021-09-30T15:35:24Z", ""),
    ],
)
def test_other_spellings_are_refused(old: str, new: str) -> None:
    assert old in TEXT
    assert not is_read(TEXT.replace(old, new))


def test_a_long_text_is_refused_before_it_is_looked_at() -> None:
    assert not is_read("a" * (MAX_MESSAGE_CHARS + 1))
