"""What a worker fetches for an assignment: from whom, whom it believes, and what it deletes for it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from azu.distribution import Library
from azu.errors import CapacityError, ModelError, NetworkError
from azu.identity import Identity
from azu.models.manifest import Manifest
from azu.tickets import Assignment
from node.supply import Supply
from node.trust import Trust
from tests.distribution.nodes import FIRST, LIMIT, ME, PUBLISHER, SECOND, Node, blob_of, manifest_of, opened

LAYERS = [bytes([number]) * (2 << 20) for number in range(4)]
MANIFEST = manifest_of(*LAYERS)


@dataclass
class Scene:
    me: Node
    other: Node  # a worker that provides the model
    folder: Path

    def supply(self, *, limit: int | None = None, trust: Identity = PUBLISHER) -> Supply:
        library = Library(self.folder / self.me.peer_id, cache_limit=limit)
        return Supply(self.me.overlay, library, Trust((trust.peer_id,)), use_hub=False)


def assignment_of(coordinator: Identity, manifest: Manifest = MANIFEST) -> Assignment:
    return Assignment(
        worker=ME.peer_id, coordinator=coordinator.peer_id, manifest=manifest.digest, start=0, end=2, dtype="float32",
        kv_tokens=1, sequence=1, expires_at=int(time.time()) + 60,
    )  # fmt: skip


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        me = await stack.enter_async_context(opened(ME, tmp_path))
        other = await stack.enter_async_context(opened(FIRST, tmp_path, b"{}", *LAYERS))
        other.library.publish(PUBLISHER, MANIFEST)
        with trio.fail_after(LIMIT):
            await me.overlay.bootstrap(other.overlay.addrs)
            await other.overlay.provide(bytes.fromhex(MANIFEST.digest))
            yield Scene(me, other, tmp_path)


async def test_all_comes_from_a_provider_though_the_coordinator_is_gone(scene: Scene) -> None:
    supply, assignment = scene.supply(), assignment_of(SECOND)  # nobody has that identity here
    manifest = await supply.manifest(assignment)
    assert manifest == MANIFEST
    assert await supply.config(assignment, manifest) == {}
    assert supply.progress.percent == 0
    files = await supply.files(assignment, manifest, {"layers.0": MANIFEST.layers[0], "layers.1": MANIFEST.layers[1]})
    assert [files[name].read_bytes() for name in ("layers.0", "layers.1")] == LAYERS[:2]
    assert supply.progress.percent == 100
    assert await supply.manifest(assignment) == MANIFEST, "kept"


async def test_a_manifest_of_a_stranger_is_not_kept(scene: Scene) -> None:
    supply = scene.supply(trust=SECOND)
    with pytest.raises(NetworkError, match=f"signed by {PUBLISHER.peer_id}"):
        await supply.manifest(assignment_of(FIRST))
    assert scene.me.library.manifests() == ()


@pytest.mark.parametrize("config", [b"[" * 100_000, b"[]", b"{", bytes(5 << 20)])
async def test_a_config_that_is_none_is_refused(scene: Scene, config: bytes) -> None:
    scene.other.library.store.put_bytes(config)
    manifest = manifest_of(b"x", config=blob_of(config))
    with pytest.raises(ModelError) as raised:
        await scene.supply().config(assignment_of(FIRST), manifest)
    assert raised.value.code == "bad_json"
    assert scene.me.library.store.has(manifest.config.digest) == (len(config) < 1 << 20), "fetched, though too large"


async def test_what_is_not_needed_makes_room_and_what_is_needed_stays(scene: Scene) -> None:
    supply, assignment = scene.supply(limit=5 << 20), assignment_of(FIRST)
    await supply.config(assignment, MANIFEST)
    for wanted in ((0, 1), (1, 2), (3,)):
        await supply.files(assignment, MANIFEST, {str(index): MANIFEST.layers[index] for index in wanted})
    store = scene.me.library.store
    assert [store.has(blob.digest) for blob in MANIFEST.layers] == [False, False, True, True]
    assert store.has(blob_of(b"{}").digest), "the config is needed with every stage"
    with pytest.raises(CapacityError, match=r"would take 6\.0 MiB, and the cache may take 5\.0 MiB"):
        await supply.files(assignment, MANIFEST, {str(index): MANIFEST.layers[index] for index in (0, 1, 2)})
