"""The key of a private swarm, as a file that go-libp2p and js-libp2p read too.

Three lines: `/key/swarm/psk/1.0.0/`, the encoding (`/base16/`, `/base64/` or `/bin/`), and 32 bytes in it.
Source: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from azu.errors import InputError, InternalError
from azu.logs import log

__all__ = ["KEY_BYTES", "check_swarm_key", "read_swarm_key", "write_new_swarm_key"]

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_MAX_FILE_BYTES = 1024  # the longest proper file has 96
_VERSION = b"/key/swarm/psk/1.0.0/"
_DECODERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"/base16/": lambda text: binascii.unhexlify(text.strip()),
    b"/base64/": lambda text: base64.b64decode(text.strip(), validate=True),
    b"/bin/": bytes,
}


def check_swarm_key(path: Path) -> Path:
    """The path, if a swarm key is there.

    Raises:
        InputError: there is none, or it holds no swarm key.
    """
    _load(path)
    return path


def read_swarm_key(path: Path | None) -> bytes | None:
    """The 32 bytes of a key file, None without one; logs a warning where other users of the machine can read it.

    Raises:
        InputError: there is none, or it holds no swarm key.
    """
    if path is None:
        return None
    key, mode = _load(path)
    if mode & 0o077:
        log(logger, logging.WARNING, "others can read the swarm key", path=path, mode=f"{mode:04o}", remedy="chmod 600")
    return key


def _load(path: Path) -> tuple[bytes, int]:
    """Key and file mode."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(
            f"the swarm key {path} cannot be read: {error.strerror}",
            code="no_swarm_key",
            remedy="Copy the file from another member of the swarm; only a new swarm gets a new one, by "
            f"`azu-bootstrap new-swarm-key {path}`",
        ) from error
    return _decode(path, data), mode


def _decode(path: Path, data: bytes) -> bytes:
    version, _, rest = data.partition(b"\n")
    encoding, _, body = rest.partition(b"\n")
    if version.rstrip(b"\r") != _VERSION:
        raise _bad(path, f"its first line is not {_VERSION.decode()}")
    decoder = _DECODERS.get(encoding.rstrip(b"\r"))
    if decoder is None:
        raise _bad(path, "its second line is none of /base16/, /base64/ and /bin/")
    try:
        key = decoder(body)
    except ValueError as error:
        raise _bad(path, f"its third line is not {encoding.decode().strip().strip('/')}") from error
    if len(key) != KEY_BYTES:
        raise _bad(path, f"it has {len(key)} bytes of key and not {KEY_BYTES}")
    return key


def _bad(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} is not a swarm key: {why}",
        code="bad_swarm_key",
        remedy="Copy the file from another member of the swarm, byte for byte",
    )


def write_new_swarm_key(path: Path) -> None:
    """Make a key for a new swarm, readable for this user only.

    Raises:
        InputError: something is there already. InternalError: it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(b"%s\n/base16/\n%s\n" % (_VERSION, secrets.token_hex(KEY_BYTES).encode()))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise InputError(
            f"{path} is there already",
            code="swarm_key_exists",
            remedy="Members of a swarm that has this key need it; choose another path for a new swarm's",
        ) from error
    except OSError as error:
        raise InternalError(
            f"the swarm key {path} cannot be written: {error.strerror}",
            remedy="Choose a folder that this user may write to",
        ) from error
