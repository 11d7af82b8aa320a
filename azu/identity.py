"""Who a node is, and how it signs.

A node's identity is an Ed25519 key pair; its libp2p peer id is derived from the public key (libp2p peer-ids spec: the
base58 of an identity multihash around the protobuf `PublicKey`), so a signature can be checked knowing the peer id
alone. What azu signs is wrapped in a libp2p signed envelope (RFC 0002), whose signature also covers a domain string:
a signed receipt can never be passed off as a ticket.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from azu.errors import InputError, InternalError, TrustError

__all__ = [
    "Identity",
    "Kind",
    "Signed",
    "load_or_create_identity",
    "open_envelope",
    "peer_id_of",
    "public_key_of",
    "seal",
]

_SEED_BYTES = 32
# protobuf PublicKey{type: Ed25519 (field 1, varint 1), data: 32 bytes (field 2)}
_PUBLIC_KEY_PREFIX = b"\x08\x01\x12\x20"
# multihash: code 0x00 (identity), length 36
_MULTIHASH_PREFIX = b"\x00\x24"
# Above any envelope azu signs (the largest is a manifest of 1 MiB); a bound on what is parsed at all.
MAX_ENVELOPE_BYTES = 1_200_000


class Kind(StrEnum):
    """What is signed; the value is both the envelope's domain string and its payload type."""

    WORKER_RECORD = "/azu/worker-record/1"
    COORDINATOR_RECORD = "/azu/coordinator-record/1"
    MANIFEST = "/azu/manifest/1"
    ASSIGNMENT = "/azu/assignment/1"
    JOB_TICKET = "/azu/job-ticket/1"
    RECEIPT = "/azu/receipt/1"
    ACCOUNT = "/azu/account/1"


def peer_id_of(public_key: bytes) -> str:
    """The base58 peer id of a raw 32-byte Ed25519 public key."""
    return base58.b58encode(_MULTIHASH_PREFIX + _PUBLIC_KEY_PREFIX + public_key).decode()


def public_key_of(peer_id: str) -> bytes:
    """The raw 32-byte Ed25519 public key inside a peer id.

    Raises:
        TrustError: the peer id is malformed or not of an Ed25519 key.
    """
    prefix = _MULTIHASH_PREFIX + _PUBLIC_KEY_PREFIX
    try:
        raw = base58.b58decode(peer_id) if len(peer_id) <= 64 else b""
    except ValueError:
        raw = b""
    if len(raw) != len(prefix) + 32 or not raw.startswith(prefix):
        raise TrustError(f"{peer_id[:64]!r} is not the peer id of an Ed25519 key", code="bad_peer_id")
    return raw[len(prefix) :]


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key pair and the peer id that follows from it. The seed is kept out of its repr."""

    seed: bytes = field(repr=False)
    peer_id: str = field(init=False)

    def __post_init__(self) -> None:
        if len(self.seed) != _SEED_BYTES:
            raise InputError(f"an identity seed has {_SEED_BYTES} bytes, not {len(self.seed)}", code="bad_identity")
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key()
        object.__setattr__(self, "peer_id", peer_id_of(public.public_bytes_raw()))

    @classmethod
    def generate(cls) -> Identity:
        """A fresh random identity."""
        return cls(os.urandom(_SEED_BYTES))

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `data`."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)


def load_or_create_identity(path: Path) -> Identity:
    """Read the identity kept at `path` (a seed in hex, mode 0600), or make one there.

    Raises:
        InputError: the file is not a key, or others may read it.
        InternalError: it cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _read_identity(path)
        except FileNotFoundError:
            _write_new_key(path)
            return _read_identity(path)
    except OSError as error:
        raise InternalError(
            f"the identity key {path} cannot be read or written: {error.strerror}",
            remedy="Give --data-dir a folder that this user owns",
        ) from error


def _write_new_key(path: Path) -> None:
    # Written aside and linked into place: two processes that start at once agree on one key, and a crash leaves none.
    # The name is random: in a container every run has the same process id, and would find what a crash left.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(os.urandom(_SEED_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def _read_identity(path: Path) -> Identity:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        text = file.read(2 * _SEED_BYTES + 2)
    if mode & 0o077:
        raise InputError(
            f"the identity key {path} can be read by others (mode {mode:04o})",
            code="key_exposed",
            remedy=f"Run: chmod 600 {path}",
        )
    try:
        return Identity(bytes.fromhex(text.decode("ascii").strip()))
    except (ValueError, InputError) as error:
        raise InputError(
            f"{path} is not an azu identity key",
            code="bad_identity",
            remedy="Restore it from a backup, or move it away to get a new identity",
        ) from error


@dataclass(frozen=True, slots=True)
class Signed:
    """The content of an envelope whose signature holds."""

    peer_id: str
    payload: bytes


def seal(identity: Identity, kind: Kind, payload: bytes) -> bytes:
    """Wrap `payload` in a signed envelope (libp2p RFC 0002) of the given kind."""
    public = public_key_of(identity.peer_id)
    signature = identity.sign(_to_sign(kind, payload))
    return b"".join(
        (
            _field(1, _PUBLIC_KEY_PREFIX + public),
            _field(2, kind.encode()),
            _field(3, payload),
            _field(5, signature),
        )
    )


def open_envelope(data: bytes, kind: Kind) -> Signed:
    """Check an envelope's signature and kind, and return who signed what.

    Raises:
        TrustError: the envelope is malformed, of another kind, or its signature does not hold.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise TrustError(f"a signed envelope of {len(data)} bytes is over the limit", code="envelope_too_large")
    fields = _parse_fields(data)
    try:
        key, payload_type, payload, signature = (fields.pop(number) for number in (1, 2, 3, 5))
    except KeyError as error:
        raise TrustError("a signed envelope lacks a field", code="bad_envelope") from error
    if fields or not key.startswith(_PUBLIC_KEY_PREFIX) or len(key) != len(_PUBLIC_KEY_PREFIX) + 32:
        raise TrustError("a signed envelope has unknown fields or no Ed25519 key", code="bad_envelope")
    if payload_type != kind.encode():
        raise TrustError(f"a signed envelope is not of kind {kind.value}", code="wrong_kind")
    public = key[len(_PUBLIC_KEY_PREFIX) :]
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _to_sign(kind, payload))
    except InvalidSignature as error:
        raise TrustError("an envelope's signature does not hold", code="bad_signature") from error
    return Signed(peer_id_of(public), payload)


def _to_sign(kind: Kind, payload: bytes) -> bytes:
    parts = (kind.encode(), kind.encode(), payload)
    return b"".join(_varint(len(part)) + part for part in parts)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _parse_fields(data: bytes) -> dict[int, bytes]:
    """A protobuf message of length-delimited fields, each at most once."""
    fields: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        tag, offset = _parse_varint(data, offset)
        length, offset = _parse_varint(data, offset)
        number, wire_type = tag >> 3, tag & 7
        if wire_type != 2 or number in fields or length > len(data) - offset:
            raise TrustError("a signed envelope is malformed", code="bad_envelope")
        fields[number] = data[offset : offset + length]
        offset += length
    return fields


def _parse_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if offset >= len(data):
            break
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise TrustError("a signed envelope is malformed", code="bad_envelope")
