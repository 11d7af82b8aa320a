from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledger.postgres import Server, binaries, running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    tools = binaries()
    if tools is None:
        pytest.skip("POSTGRESQL IS NOT TESTED: install it (Debian: apt-get install postgresql)")
    with running(tools) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with nothing in it, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    server: Server = request.getfixturevalue("postgres")
    return server.url()
