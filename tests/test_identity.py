"""Keys, peer ids and envelopes: as libp2p has them, private on disk, and refused when a byte is off."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope
from libp2p.peer.id import ID

from azu.errors import InputError, InternalError, TrustError
from azu.identity import (
    MAX_ENVELOPE_BYTES,
    Identity,
    Kind,
    load_or_create_identity,
    open_envelope,
    peer_id_of,
    public_key_of,
    seal,
)

ALICE = Identity(b"a" * 32)
seeds = st.binary(min_size=32, max_size=32)


# --- peer ids


@given(seeds)
def test_peer_ids_are_libp2ps_own(seed: bytes) -> None:
    identity = Identity(seed)
    theirs = create_new_key_pair(seed)
    assert identity.peer_id == str(ID.from_pubkey(theirs.public_key))
    assert public_key_of(identity.peer_id) == theirs.public_key.to_bytes()
    assert peer_id_of(public_key_of(identity.peer_id)) == identity.peer_id


@given(seeds, st.binary(max_size=100))
def test_signatures_are_libp2ps_own(seed: bytes, data: bytes) -> None:
    signature = Identity(seed).sign(data)
    theirs = create_new_key_pair(seed)
    assert theirs.public_key.verify(data, signature)
    assert theirs.private_key.sign(data) == signature


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "12D3KooW",
        "not base58 0OIl",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key's: a hash, no key inside
        "1" * 64,
        "1" * 10_000,
        ALICE.peer_id + "x",
        ALICE.peer_id[:-1],
        "ä" * 52,
    ],
)
def test_other_peer_ids_are_refused(peer_id: str) -> None:
    with pytest.raises(TrustError) as raised:
        public_key_of(peer_id)
    assert raised.value.code == "bad_peer_id"
    assert len(raised.value.message) < 200


@given(st.text(max_size=70))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    with suppress(TrustError):
        assert peer_id_of(public_key_of(text)) == text


def test_a_seed_has_32_bytes() -> None:
    for size in (0, 31, 33):
        with pytest.raises(InputError):
            Identity(bytes(size))


def test_the_seed_is_never_shown() -> None:
    identity = Identity(bytes(range(32)))
    for shown in (repr(identity), str(identity), f"{identity}", repr({"who": identity})):
        assert identity.peer_id in shown
        for secret in (repr(identity.seed), repr(identity.seed)[2:-1], identity.seed.hex(), "seed"):
            assert secret not in shown
    assert Identity.generate() != Identity.generate()


# --- the key file


def test_a_key_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity.key"
    made = load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_identity(path) == made
    assert [each.name for each in path.parent.iterdir()] == ["identity.key"]


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create_identity(tmp_path / "identity.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660, 0o666])
def test_an_exposed_key_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    made = load_or_create_identity(path)
    path.chmod(mode)
    with pytest.raises(InputError) as raised:
        load_or_create_identity(path)
    assert raised.value.code == "key_exposed"
    assert raised.value.remedy == f"Run: chmod 600 {path}"
    assert made.seed.hex() not in str(raised.value)
    subprocess.run(raised.value.remedy.removeprefix("Run: ").split(), check=True)
    assert load_or_create_identity(path) == made


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"ab" * 31, b"ab" * 33, b"zz" * 32, b"\xff" * 64, b"ab" * 32 + b"\nmore", b"\0" * 1000]
)
def test_a_damaged_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError) as raised:
        load_or_create_identity(path)
    assert raised.value.code == "bad_identity"
    assert raised.value.remedy
    assert path.read_bytes() == content


def test_what_a_crash_left_does_not_stop_the_next_start(tmp_path: Path) -> None:
    """In a container every start has the same process id, so a name made of it alone would be taken."""
    (tmp_path / f"identity.key.{os.getpid()}.tmp").write_text("half a k")
    assert load_or_create_identity(tmp_path / "identity.key") == load_or_create_identity(tmp_path / "identity.key")


@pytest.mark.parametrize("kind", ["parent is a file", "key is a folder"])
def test_an_unusable_place_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "parent is a file":
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "identity.key"
    else:
        path = tmp_path / "identity.key"
        path.mkdir()
    with pytest.raises(InternalError, match="cannot be read or written"):
        load_or_create_identity(path)


RACER = """
import sys, time
from pathlib import Path
from azu.identity import load_or_create_identity
print("ready", flush=True)
sys.stdin.readline()
print(load_or_create_identity(Path(sys.argv[1])).peer_id, flush=True)
"""


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        answers = {racer.communicate(timeout=60)[0] for racer in racers}
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert answers == {f"{load_or_create_identity(path).peer_id}\n"}
    assert [each.name for each in tmp_path.iterdir()] == ["identity.key"]


# --- envelopes


@given(seeds, st.sampled_from(Kind), st.binary(max_size=400))
@example(b"s" * 32, Kind.MANIFEST, b"p" * 20_000)  # lengths of three bytes
def test_an_envelope_opens_to_what_was_sealed(seed: bytes, kind: Kind, payload: bytes) -> None:
    signed = open_envelope(seal(Identity(seed), kind, payload), kind)
    assert (signed.peer_id, signed.payload) == (Identity(seed).peer_id, payload)


@given(seeds, st.sampled_from(Kind), st.binary(max_size=400))
def test_libp2p_reads_our_envelopes_and_we_read_its(seed: bytes, kind: Kind, payload: bytes) -> None:
    ours = seal(Identity(seed), kind, payload)
    read = unmarshal_envelope(ours)
    read.validate(kind.value)
    assert (read.raw_payload, read.payload_type) == (payload, kind.encode())
    assert str(ID.from_pubkey(read.public_key)) == Identity(seed).peer_id

    keys = create_new_key_pair(seed)
    signature = keys.private_key.sign(make_unsigned(kind.value, kind.encode(), payload))
    theirs = Envelope(keys.public_key, kind.encode(), payload, signature).marshal_envelope()
    if payload:  # protobuf leaves an empty field out, and azu signs nothing empty
        assert open_envelope(theirs, kind).payload == payload
        assert theirs == ours


@given(st.data())
def test_a_changed_byte_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(seal(ALICE, Kind.RECEIPT, b"the payload of it"))
    index = data.draw(st.integers(0, len(sealed) - 1))
    sealed[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TrustError):
        open_envelope(bytes(sealed), Kind.RECEIPT)


def test_every_flipped_bit_is_refused() -> None:
    sealed = seal(ALICE, Kind.RECEIPT, b"x")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TrustError):
            open_envelope(bytes(changed), Kind.RECEIPT)


@given(st.data())
def test_a_cut_or_longer_envelope_is_refused(data: st.DataObject) -> None:
    sealed = seal(ALICE, Kind.RECEIPT, b"the payload of it")
    cut = sealed[: data.draw(st.integers(0, len(sealed) - 1))]
    longer = sealed + data.draw(st.binary(min_size=1, max_size=20))
    for changed in (cut, longer):
        with pytest.raises(TrustError):
            open_envelope(changed, Kind.RECEIPT)


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_trust_errors(data: bytes) -> None:
    with pytest.raises(TrustError):
        open_envelope(data, Kind.RECEIPT)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.RECEIPT])
def test_an_envelope_of_another_kind_is_refused(kind: Kind) -> None:
    sealed = seal(ALICE, Kind.RECEIPT, b"payload")
    with pytest.raises(TrustError) as raised:
        open_envelope(sealed, kind)
    assert raised.value.code == "wrong_kind"
    # Nor does it help to write another kind over it: the signature covers the domain.
    renamed = _join(*_parts(kind.encode(), b"payload", _signature(sealed)))
    with pytest.raises(TrustError) as raised:
        open_envelope(renamed, kind)
    assert raised.value.code == "bad_signature"


def test_the_domain_is_signed_besides_the_payload_type() -> None:
    """An envelope whose signature covers the payload type alone, or another domain, does not hold."""
    kind, payload = Kind.RECEIPT, b"payload"
    for domain in ("", "/azu/job-ticket/1"):
        signature = ALICE.sign(make_unsigned(domain, kind.encode(), payload))
        with pytest.raises(TrustError) as raised:
            open_envelope(_join(*_parts(kind.encode(), payload, signature)), kind)
        assert raised.value.code == "bad_signature"


def test_another_signer_cannot_put_their_name_to_it() -> None:
    mallory = Identity(b"m" * 32)
    parts = _parts(Kind.RECEIPT.encode(), b"payload", _signature(seal(mallory, Kind.RECEIPT, b"payload")))
    with pytest.raises(TrustError) as raised:
        open_envelope(_join(*parts), Kind.RECEIPT)
    assert raised.value.code == "bad_signature"


def test_odd_envelopes_are_refused() -> None:
    kind = Kind.RECEIPT
    key, name, payload, signature = _parts(kind.encode(), b"p", _signature(seal(ALICE, kind, b"p")))
    assert open_envelope(_join(key, name, payload, signature), kind).payload == b"p"
    rsa = (1, b"\x08\x00\x12\x20" + key[1][4:])
    odd = {
        "a field twice": _join(key, name, payload, payload, signature),
        "a field more": _join(key, name, payload, (6, b""), signature),
        "no signature": _join(key, name, payload),
        "no key": _join(name, payload, signature),
        "another kind of key": _join(rsa, name, payload, signature),
        "a short key": _join((1, key[1][:-1]), name, payload, signature),
        "a short signature": _join(key, name, payload, (5, signature[1][:-1])),
        "no bytes": b"",
        "a length of ten bytes": b"\x0a" + b"\xff" * 9 + b"\x01",
        "a number as a field": b"\x08\x01" + _join(key, name, payload, signature),
    }
    for case, data in odd.items():
        with pytest.raises(TrustError) as raised:
            open_envelope(data, kind)
        assert raised.value.code in ("bad_envelope", "bad_signature"), case


def test_a_huge_envelope_is_not_even_parsed() -> None:
    with pytest.raises(TrustError) as raised:
        open_envelope(bytes(MAX_ENVELOPE_BYTES + 1), Kind.MANIFEST)
    assert raised.value.code == "envelope_too_large"


Part = tuple[int, bytes]


def _parts(name: bytes, payload: bytes, signature: bytes) -> tuple[Part, Part, Part, Part]:
    key = b"\x08\x01\x12\x20" + public_key_of(ALICE.peer_id)
    return (1, key), (2, name), (3, payload), (5, signature)


def _join(*parts: Part) -> bytes:
    return b"".join(bytes([number << 3 | 2, len(value)]) + value for number, value in parts)


def _signature(sealed: bytes) -> bytes:
    return sealed[-64:]
