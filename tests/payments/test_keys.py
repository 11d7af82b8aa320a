from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr
from solders.keypair import Keypair

from azu.errors import InputError
from azu.payments.keys import ed25519_seed, read_private_key

SEED = bytes(range(1, 33))
PAIR = bytes(Keypair.from_seed(SEED))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (SEED.hex(), SEED),
        ("0x" + SEED.hex().upper(), SEED),
        (json.dumps(list(SEED)), SEED),
        (json.dumps(list(PAIR)), PAIR),  # as solana-keygen writes it
        (f"  {PAIR.hex()}\n", PAIR),
    ],
    ids=["hex", "0x", "array", "pair", "pair in hex"],
)
def test_a_key_is_read_from_text_and_from_a_file(text: str, key: bytes, tmp_path: Path) -> None:
    assert read_private_key(SecretStr(text)) == key
    (tmp_path / "key").write_text(text)
    (tmp_path / "key").chmod(0o600)
    assert read_private_key(SecretStr(str(tmp_path / "key"))) == key
    assert ed25519_seed(key) == SEED


@pytest.mark.parametrize(
    "text",
    ["", SEED.hex()[:-1], "zz" * 32, "[1, 2]", "[1, 2", "[300]", json.dumps([1.5] * 32), json.dumps(["1"] * 32),
     "[" * 5000, "/nowhere/key", "\0", "~nobody-of-this-name/key"],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_private_key(SecretStr(text))
    assert caught.value.code == "bad_key"
    assert not text or text not in str(caught.value)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SEED.hex())
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(InputError, match="others may read"):
        read_private_key(SecretStr(str(tmp_path / "key")))


def test_a_file_of_rubbish_is_refused(tmp_path: Path) -> None:
    for content in (b"rubbish", b"\xff\xfe", b""):
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(0o600)
        with pytest.raises(InputError) as caught:
            read_private_key(SecretStr(str(tmp_path / "key")))
        assert caught.value.code == "bad_key"


def test_halves_of_two_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="do not belong together"):
        ed25519_seed(PAIR[:32] + bytes(32))
