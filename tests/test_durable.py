"""Files appear whole or not at all, and what gives them their names is on disk before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from azu.durable import make_folder, write_file


def test_the_order_of_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, then the new folder, then the name: on disk, each before the next is begun."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.split('.')[0]}")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    make_folder(tmp_path / "a" / "b")
    assert done == [f"sync {tmp_path.name}", "sync a"]
    done.clear()
    write_file(tmp_path / "a" / "b" / "file", b"bytes")
    assert done == ["sync file", "name", "sync b"]
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"bytes"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    write_file(place, b"old")

    def full(_: int) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        write_file(place, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert place.read_bytes() == b"old"
