"""One swarm for all tests of this folder, and the azu-dht program to ask it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from azu.dht_cli import main
from tests.dht.lively import Lively, lively_swarm
from tests.dht.swarm import assert_refused


@pytest.fixture(scope="session")
def lively() -> Iterator[Lively]:
    with lively_swarm() as swarm:
        yield swarm


class Program:
    """azu-dht, in this process: its imports take longer than most of its answers."""

    def __init__(self, bootstrap: str) -> None:
        self._environment = {"AZU_BOOTSTRAP": bootstrap, "AZU_SWARM_KEY": None, "AZU_AS_JSON": None}

    def run(self, *words: str) -> Result:
        """Whatever comes of it."""
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            return CliRunner(env=self._environment).invoke(main, words)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)

    def text(self, *words: str) -> str:
        """What a command prints for people."""
        done = self.run(*words)
        assert (done.exit_code, done.stderr) == (0, "")
        assert not set(done.stdout) & {"\x1b", "\x07", "\r", "\u202e"}
        return done.stdout

    def document(self, *words: str) -> Any:
        """What it prints for programs."""
        text = self.text(*words, "--json")
        assert text.isascii()
        return json.loads(text)

    def refusal(self, code: int, *words: str) -> str:
        """The error and remedy that it ends with."""
        done = self.run(*words)
        assert_refused(done.exit_code, done.stdout, done.stderr, code)
        return done.stderr


@pytest.fixture
def program(lively: Lively, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    monkeypatch.chdir(tmp_path)
    return Program(lively.address)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """The program without a swarm."""
    monkeypatch.chdir(tmp_path)
    return Program("")
