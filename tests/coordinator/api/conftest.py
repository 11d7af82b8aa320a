"""A coordinator's HTTP side, served by a real hypercorn on loopback over an in-process twin of the swarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import openai
import pytest
import trio

from azu.ledger import Database
from coordinator.api import ApiSettings, create_app, serve_http
from tests.coordinator.api.twin import Twin, served_model

T = TypeVar("T")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a ledger in wei, with nothing in it: copied, since making one takes a while."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite3"
    database = Database(f"sqlite:///{path}")
    database.prepare("wei")
    database.close()
    return path


@pytest.fixture
def twin(model_folder: Path) -> Twin:
    return Twin([served_model(model_folder)])


@pytest.fixture
def settings() -> ApiSettings:
    return ApiSettings(max_body_bytes=100_000)


@pytest.fixture
async def url(nursery: trio.Nursery, twin: Twin, settings: ApiSettings) -> str:
    app = create_app(twin, settings)
    started: str = await nursery.start(partial(serve_http, app, "127.0.0.1", 0))
    return started


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


async def in_thread(work: Callable[[], T]) -> T:
    """Run the synchronous client beside the server."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
