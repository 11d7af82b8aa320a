"""A program's data folder: made with private permissions and held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from azu.errors import InputError, InternalError
from azu.identity import Identity, load_or_create_identity

__all__ = ["is_in_use", "open_data_dir", "share_data_dir"]


@contextmanager
def open_data_dir(path: Path) -> Iterator[Identity]:
    """Hold the data folder of one program and return the identity kept in it; both are made where missing.

    Raises:
        InputError: another process holds it, or its key is exposed or damaged.
        InternalError: it cannot be made.
    """
    with _usable(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is using the data folder {path}",
                code="data_dir_in_use",
                remedy="Stop it, or give this one a --data-dir of its own",
            ) from error
        yield load_or_create_identity(path / "identity.key")
    finally:
        os.close(descriptor)


def is_in_use(path: Path) -> bool:
    """Whether a process holds a data folder."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def share_data_dir(path: Path) -> Identity:
    """Return the identity kept in a data folder, whether or not a process holds it; both are made where missing.

    Raises:
        InputError: its key is exposed or damaged.
        InternalError: it cannot be made.
    """
    with _usable(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return load_or_create_identity(path / "identity.key")


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InternalError(
            f"the data folder {path} cannot be used: {error.strerror}",
            remedy="Give --data-dir a folder that this user may write to",
        ) from error
