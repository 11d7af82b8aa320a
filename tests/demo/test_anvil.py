"""Where the demo's chain comes from: the PATH, or npm, and then only the very file that azu knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from azu.demo.anvil import find_anvil
from azu.errors import InputError


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of its own, on a machine that npm has a package for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return folder


def program(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def refused(home: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        find_anvil(home)
    assert caught.value.code == "no_anvil"
    assert "npm" in caught.value.remedy
    return caught.value


def test_the_paths_own_is_taken(tools: Path, tmp_path: Path) -> None:
    own = program(tools, "anvil")
    assert find_anvil(tmp_path / "home") == own
    assert not (tmp_path / "home").exists()


def test_without_both_it_says_so(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "home")
    program(tools, "npm")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    refused(tmp_path / "home")


def test_npms_own_words_are_passed_on(tools: Path, tmp_path: Path) -> None:
    program(tools, "npm", "echo no network >&2", "exit 1")
    assert "no network" in refused(tmp_path / "home").message


def test_another_file_is_not_run(tools: Path, tmp_path: Path) -> None:
    place = "$3/node_modules/@foundry-rs/anvil-linux-amd64/bin"
    program(tools, "npm", f"/bin/mkdir -p {place} && echo rubbish > {place}/anvil")
    assert "is not the anvil" in refused(tmp_path / "home").message
