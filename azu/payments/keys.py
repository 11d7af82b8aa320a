"""The platform's private key out of a setting: hex, a JSON array of bytes, or a file that holds either."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from pydantic import SecretStr

from azu.errors import InputError

__all__ = ["ed25519_seed", "no_key", "read_private_key"]

_SEED_BYTES, _PAIR_BYTES = 32, 64
_MAX_CHARS = 4096


def read_private_key(secret: SecretStr) -> bytes:
    """The key's 32 bytes, or 64 where it is a Solana key pair. No error shows any of it.

    Raises:
        InputError: code "bad_key": neither hex, nor a JSON array, nor a file with one; or others may read the file.
    """
    given = secret.get_secret_value().strip()
    key = _decoded(given)
    return key if key is not None else _from_file(given)


def ed25519_seed(key: bytes) -> bytes:
    """The seed in a Solana key, whose public half must belong to it.

    Raises:
        InputError: code "bad_key".
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    seed, public = key[:_SEED_BYTES], key[_SEED_BYTES:]
    if public and Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        raise _bad("the private key's two halves do not belong together")
    return seed


def no_key() -> InputError:
    """The error of who shall pay and has no key."""
    remedy = "Set SCHEDULER_PRIVATE_KEY"
    return InputError("payouts need the platform's private key", code="no_key", remedy=remedy)


def _decoded(given: str) -> bytes | None:
    """None where it is neither hex nor an array."""
    digits = given.removeprefix("0x")
    if len(digits) in (2 * _SEED_BYTES, 2 * _PAIR_BYTES) and all(digit in "0123456789abcdefABCDEF" for digit in digits):
        return bytes.fromhex(digits)
    if not given.startswith("["):
        return None
    try:
        values = json.loads(given[:_MAX_CHARS])
        key = bytes(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise _bad("the private key is no JSON array of bytes") from error
    if len(key) not in (_SEED_BYTES, _PAIR_BYTES):
        raise _bad(f"the private key has {len(key)} bytes, not {_SEED_BYTES} or {_PAIR_BYTES}")
    return key


def _from_file(given: str) -> bytes:
    # Should it be a mistyped key, it shall not come back in an error: the path is not repeated.
    try:
        with Path(given).expanduser().open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise _bad("others may read the private key's file", "Run: chmod 600 on it")
            content = file.read(_MAX_CHARS).decode().strip()
    except (OSError, ValueError, RuntimeError) as error:
        raise _bad("the private key is neither hex, nor a JSON array, nor a file that can be read") from error
    key = _decoded(content)
    if key is None:
        raise _bad("the private key's file holds neither hex nor a JSON array")
    return key


def _bad(what: str, remedy: str = "SCHEDULER_PRIVATE_KEY takes 32 bytes in hex, a JSON array, or a file") -> InputError:
    return InputError(what, code="bad_key", remedy=remedy)
