"""Files that survive a power loss: a name appears only after the bytes, and the folders above it, are on disk.

POSIX promises neither that a rename comes after the data nor that a new name is there after a crash, until file and
folder are synced (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import IO

__all__ = ["make_folder", "replace_synced", "sync_folder", "write_file"]


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each on disk before this returns; none where it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def replace_synced(file: IO[bytes], temporary: Path, place: Path) -> None:
    """Gives an open, written file its final name."""
    file.flush()
    os.fsync(file.fileno())
    make_folder(place.parent)
    temporary.replace(place)
    sync_folder(place.parent)


def write_file(place: Path, data: bytes) -> None:
    """Writes a small file whole, or leaves what was there."""
    temporary = place.with_name(f"{place.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            replace_synced(file, temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
