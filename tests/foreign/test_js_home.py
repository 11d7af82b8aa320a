"""The installation of js-libp2p: once, again when a pin changes, and never by half."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.foreign.js_home import install, why_not


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of its own; `program` puts something into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, *lines: str) -> None:
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "js"
    folder.mkdir()
    for name in ("package.json", "package-lock.json", "peer.mjs"):
        (folder / name).write_text(f"{name} 1")
    return folder


@pytest.mark.parametrize(
    ("version", "reason"), [("v18.20.4", "too old"), ("", "too old"), ("v20.0.0", ""), ("v26.1.0", "")]
)
def test_an_old_node_is_named(tools: Path, version: str, reason: str) -> None:
    program(tools, "npm")
    program(tools, "node", f"echo {version}")
    assert (reason in why_not()) if reason else not why_not()


def test_a_missing_npm_is_named(tools: Path) -> None:
    program(tools, "node", "echo v22.0.0")
    assert "missing" in why_not()


def test_packages_are_installed_once_and_scripts_are_always_current(tools: Path, source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    program(tools, "npm", 'echo "$*" >> ran')
    assert install(source, home) == install(source, home) == home
    (source / "peer.mjs").write_text("peer.mjs 2")
    install(source, home)
    assert (home / "peer.mjs").read_text() == "peer.mjs 2"
    assert len((home / "ran").read_text().splitlines()) == 1
    (source / "package-lock.json").write_text("package-lock.json 2")
    install(source, home)
    assert (home / "package-lock.json").read_text() == "package-lock.json 2"
    assert len((home / "ran").read_text().splitlines()) == 2


def test_an_installation_that_failed_says_why_and_is_tried_again(tools: Path, source: Path, tmp_path: Path) -> None:
    program(tools, "npm", "echo no network >&2", "exit 1")
    with pytest.raises(RuntimeError, match="no network"):
        install(source, tmp_path / "home")
    program(tools, "npm", "echo done > ran")
    install(source, tmp_path / "home")
    assert (tmp_path / "home/ran").exists()
