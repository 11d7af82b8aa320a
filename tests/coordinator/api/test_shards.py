"""POST /models/shard and GET /models/status: who may, what is accepted, and how a model's cutting reads as JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from azu.errors import AzuError, InternalError, ModelError
from azu.models.manifest import Manifest
from azu.models.progress import Progress, Report
from coordinator.api import ApiSettings, ShardRoutes, create_app, serve_http
from coordinator.shards import ShardQueue
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import MODEL_ID, Twin, served_model

TOKEN = "the-operators-own-token"
PATIENCE_S = 30.0


class Cutter:
    """Cuts what it is told to, in the queue's thread."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.steps: list[Progress] = []
        self.error: AzuError | None = None
        self.go_on = False
        self.asked: list[str] = []
        self.removed: set[str] = set()

    def __call__(self, model_id: str, report: Report) -> Manifest:
        self.asked.append(model_id)
        for step in self.steps:
            report(step)
        while not self.go_on:
            trio.from_thread.run(trio.sleep, 0.01)
        if self.error is not None:
            raise self.error
        return self.manifest


class Client:
    """An HTTP client of the routes."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def shard(self, body: object, token: str | None = TOKEN) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
        return await in_thread(lambda: httpx.post(f"{self._url}/models/shard", json=body, headers=headers))

    async def status(self, **query: str) -> httpx.Response:
        return await in_thread(lambda: httpx.get(f"{self._url}/models/status", params=query))

    async def wait_for(self, model_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with trio.fail_after(PATIENCE_S):
            while not reached(found := (await self.status(model_id=model_id)).json()):
                await trio.sleep(0.02)
        return found


@pytest.fixture
def cutter(tmp_path: Path) -> Cutter:
    return Cutter(served_model(tmp_path).manifest)


@pytest.fixture
async def client(nursery: trio.Nursery, twin: Twin, cutter: Cutter) -> Client:
    queue = ShardQueue(cutter)
    nursery.start_soon(queue.run)
    app = create_app(
        twin, ApiSettings(), ShardRoutes(queue, twin.models, lambda digest: digest not in cutter.removed, TOKEN)
    )
    return Client(await nursery.start(partial(serve_http, app, "127.0.0.1", 0)))


def error_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"]


async def test_from_queued_to_ready(client: Client, cutter: Cutter) -> None:
    cutter.steps = [Progress("downloading", "model.safetensors", 10, 100)]
    response = await client.shard({"model_id": "me/tiny@v1"})
    assert (response.status_code, response.headers["content-type"]) == (202, "application/json")
    empty = dict.fromkeys(["item", "done", "total", "rate", "revision", "manifest", "layers", "bytes", "error"])
    assert response.json() == {"object": "shard", "model_id": "me/tiny@v1", "state": "queued", **empty}
    found = await client.wait_for("me/tiny@v1", lambda found: found["done"] is not None)
    assert (found["state"], found["item"]) == ("downloading", "model.safetensors")
    assert (found["done"], found["total"]) == (10, 100)
    again = await client.shard({"model_id": "me/tiny@v1"})
    assert (again.status_code, again.json()["state"]) == (202, "downloading")
    cutter.go_on = True
    found = await client.wait_for("me/tiny@v1", lambda found: found["state"] == "ready")
    manifest = cutter.manifest
    assert (found["manifest"], found["layers"]) == (manifest.digest, manifest.n_layers)
    assert (found["revision"], found["error"]) == (manifest.revision, None)
    assert found["bytes"] == sum(blob.size for blob in manifest.blobs())
    assert cutter.asked == ["me/tiny@v1"]


async def test_the_layer_at_hand(client: Client, cutter: Cutter) -> None:
    cutter.steps = [Progress("cutting", "layer 3", 3, 9)]
    await client.shard({"model_id": "me/tiny"})
    found = await client.wait_for("me/tiny", lambda found: found["state"] == "cutting")
    assert (found["item"], found["done"], found["total"], found["rate"]) == ("layer 3", 3, 9, None)
    cutter.go_on = True


async def test_failed_with_its_reason(client: Client, cutter: Cutter) -> None:
    cutter.error, cutter.go_on = ModelError("it has none", code="no_weights", remedy="Choose another."), True
    await client.shard({"model_id": "me/tiny"})
    found = await client.wait_for("me/tiny", lambda found: found["state"] == "failed")
    assert found["error"] == {"code": "no_weights", "message": "it has none", "remedy": "Choose another."}


async def test_our_own_faults_stay_in_the_log(client: Client, cutter: Cutter) -> None:
    cutter.error, cutter.go_on = InternalError("/home/op/secret is full", code="storage", remedy="Free /home/op"), True
    await client.shard({"model_id": "me/tiny"})
    found = await client.wait_for("me/tiny", lambda found: found["state"] == "failed")
    assert found["error"]["code"] == "storage"
    assert "/home" not in str(found)


@pytest.mark.parametrize("token", [None, "x", "another", TOKEN[:-1], f"{TOKEN}x", "é"])
async def test_only_the_operator_may(client: Client, cutter: Cutter, token: str | None) -> None:
    for body in ({"model_id": "me/tiny"}, {}):
        response = await client.shard(body, token)
        assert error_of(response) == (401, "admin_token_required")
        assert response.headers["www-authenticate"] == "Bearer"
    assert cutter.asked == []
    assert (await client.status(model_id="me/tiny")).status_code == 404


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"model_id": None}, "missing_required_parameter"),
        ({"model_id": 7}, "invalid_type"),
        ({"model_id": "me/tiny", "path": "/etc"}, "unknown_parameter"),
        ([], "invalid_json"),
        *(
            ({"model_id": bad}, "invalid_value")
            for bad in ("/etc/passwd", "./model", "../x/y", "~/m", "C:\\m", "https://huggingface.co/me/tiny", "a/b/c",
                        "me/tiny@../..", "me/tiny@/x", "", "me/tiny\n", "file:///m", "me/" + "x" * 200)
        ),
    ],
)  # fmt: skip
async def test_nothing_but_hub_ids(client: Client, cutter: Cutter, body: object, code: str) -> None:
    assert error_of(await client.shard(body)) == (400, code)
    assert cutter.asked == []


async def test_bodies_are_bounded(client: Client) -> None:
    assert error_of(await client.shard({"model_id": "x" * 100_000})) == (413, "request_too_large")


async def test_too_many_at_once(client: Client, cutter: Cutter) -> None:
    codes = [(await client.shard({"model_id": f"me/m{number}"})).status_code for number in range(18)]
    assert codes == [202] * 17 + [503]  # one is being cut, sixteen wait
    cutter.go_on = True


async def test_what_is_served_is_ready(client: Client, twin: Twin) -> None:
    found = (await client.status(model_id=MODEL_ID)).json()
    assert (found["state"], found["manifest"]) == ("ready", twin.served[0].manifest.digest)


async def test_what_was_removed_or_replaced_since_is_not_ready(client: Client, cutter: Cutter, twin: Twin) -> None:
    cutter.go_on = True
    for model_id in ("me/tiny", MODEL_ID):
        await client.shard({"model_id": model_id})
        await client.wait_for(model_id, lambda found: found["state"] == "ready")
    cutter.removed.add(cutter.manifest.digest)
    assert error_of(await client.status(model_id="me/tiny")) == (404, "model_not_found")
    found = (await client.status(model_id=MODEL_ID)).json()
    assert (found["state"], found["manifest"]) == ("ready", twin.served[0].manifest.digest)


async def test_what_nobody_asked_for(client: Client) -> None:
    assert error_of(await client.status(model_id="me/other")) == (404, "model_not_found")
    assert error_of(await client.status()) == (400, "missing_required_parameter")
