"""Whether there is room on a disk for what is about to be written."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from azu.errors import InternalError
from azu.sizes import format_size

__all__ = ["check_space"]


def check_space(needs: Mapping[Path, int]) -> None:
    """Checks folders (which need not exist yet) for the bytes that each shall take; those on one disk together.

    Raises:
        InternalError: code "storage", where a disk does not have as much.
    """
    by_disk: defaultdict[int, list[Path]] = defaultdict(list)
    for folder in needs:
        by_disk[_existing(folder).stat().st_dev].append(folder)
    for folders in by_disk.values():
        need, free = sum(needs[folder] for folder in folders), shutil.disk_usage(_existing(folders[0])).free
        if need > free:
            where = " and ".join(map(str, folders))
            raise InternalError(
                f"the disk is too small: {where} would take {format_size(need)} more, and {format_size(free)} are free",
                code="storage",
                remedy="Free some disk space, or choose folders on another disk (--data-dir, HF_HOME).",
            )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
