"""Three nodes, for every test its own."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from azu.distribution import Library
from tests.distribution.nodes import BIG, EMPTY, FIRST, ME, SECOND, SMALL, Nodes, all_opened


@pytest.fixture(scope="session")
def holdings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with every file; copying it is quicker than storing them anew."""
    folder = tmp_path_factory.mktemp("holdings")
    library = Library(folder)
    for data in (BIG, SMALL, EMPTY):
        library.store.put_bytes(data)
    return folder


@pytest.fixture
async def nodes(tmp_path: Path, holdings: Path) -> AsyncIterator[Nodes]:
    """(me, first, second): I am connected to the two others, which hold every file."""
    for holder in (FIRST, SECOND):
        shutil.copytree(holdings, tmp_path / holder.peer_id)
    async with all_opened(tmp_path, ME, FIRST, SECOND) as (me, first, second):
        for other in (first, second):
            await me.overlay.connect(other.peer_id, other.overlay.addrs)
        yield me, first, second
