"""A worker's orders over real overlays: what it refuses, and that no order and no fault of its own ends it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from azu.channel import Channel, RefusedError
from azu.distribution import LayerServer, Library
from azu.errors import AzuError, InputError, ModelError, NetworkError
from azu.overlay import Overlay
from azu.records import WorkerRecord, is_live, open_worker_record, worker_key
from azu.tickets import Assignment, sign_assignment
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, Accepted, Assign, GetStatus, Status
from node.engine.blocks import BLOCK
from node.engine.device import open_device_thread
from node.engine.hardware import find_device
from node.jobs import Loaded
from node.report import serve_report
from node.status import fetch_status, show_status
from node.trust import Trust
from node.worker import Worker
from tests.node.real_stages import LIMIT, identity, peer

MANIFEST = "a" * 64


class LoaderTwin:
    """Loads nothing, when it is told to; `faults` are raised first."""

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self.go = trio.Event()
        self.loads = 0
        self.percent = 0

    async def load(self, assignment: Assignment) -> Loaded:
        self.loads += 1
        await self.go.wait()
        if self.faults:
            raise self.faults.pop(0)
        stage: Any = SimpleNamespace(kv_block=BLOCK)
        return Loaded(assignment.manifest, assignment.start, assignment.end, stage, assignment.kv_tokens, 1, 1, 4096)


@dataclass
class Scene:
    worker: Worker
    loader: LoaderTwin
    overlay: Overlay  # the worker's
    coordinators: dict[int, Overlay]
    sequence: int = 0

    async def order(self, start: int = 0, end: int = 2, *, by: int = 99, **changes: Any) -> str:
        """Give an assignment; "" or the refusal's code."""
        self.sequence += 1
        fields = {
            "worker": self.overlay.peer_id, "coordinator": identity(by).peer_id, "manifest": MANIFEST, "start": start,
            "end": end, "dtype": "float32", "kv_tokens": 32, "sequence": self.sequence,
            "expires_at": int(time.time()) + 60,
        }  # fmt: skip
        envelope = sign_assignment(identity(by), Assignment.model_validate(fields | changes))
        async with await self.coordinators[by].open_stream(self.overlay.peer_id, CONTROL_PROTOCOL) as stream:
            channel = Channel(stream, CONTROL)
            await channel.send(Assign(), envelope)
            try:
                await channel.expect(Accepted)
            except RefusedError as error:
                return error.code
            return ""

    async def record(self) -> WorkerRecord:
        async with await self.coordinators[99].open_stream(self.overlay.peer_id, CONTROL_PROTOCOL) as stream:
            channel = Channel(stream, CONTROL)
            await channel.send(GetStatus())
            return open_worker_record(bytes((await channel.expect(Status))[1]))

    async def until(self, state: str) -> None:
        while {held.state for held in (await self.record()).ranges} != ({state} if state else set()):
            await trio.sleep(0.01)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with _scene(tmp_path, trust=(identity(99).peer_id, identity(98).peer_id)) as scene:
        yield scene


@asynccontextmanager
async def _scene(tmp_path: Path, trust: tuple[str, ...]) -> AsyncIterator[Scene]:
    with trio.fail_after(LIMIT):
        async with peer(1) as overlay, peer(99) as one, peer(98) as other, open_device_thread() as thread:
            device = find_device("cpu", 2**20, 1)
            library = Library(tmp_path)
            worker = Worker(
                identity(1), overlay, thread, device, library, LayerServer(library), dtype="float32",
                trust=Trust(trust), payout_address="",
            )  # fmt: skip
            loader = LoaderTwin()
            worker._loader = loader  # type: ignore[assignment]
            async with trio.open_nursery() as nursery:
                for coordinator in (one, other):
                    await coordinator.connect(overlay.peer_id, overlay.addrs)
                async with await one.open_stream(overlay.peer_id, CONTROL_PROTOCOL):  # it speaks that from the first
                    nursery.start_soon(worker.run)
                yield Scene(worker, loader, overlay, {99: one, 98: other})
                nursery.cancel_scope.cancel()


async def test_an_order_is_followed_and_repeating_it_changes_nothing(scene: Scene) -> None:
    assert await scene.order() == ""
    await scene.until("loading")
    assert await scene.order() == "loading"
    scene.loader.go.set()
    await scene.until("loaded")
    assert await scene.order() == ""
    assert scene.loader.loads == 1
    assert await scene.order(2, 4) == ""
    await scene.until("loaded")
    assert scene.worker.jobs.loaded is not None
    assert scene.worker.jobs.loaded.start == 2


async def test_a_worker_that_leaves_withdraws_its_record(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT):
        async with peer(97) as watcher:
            async with _scene(tmp_path, trust=()) as scene:
                key = worker_key(scene.overlay.peer_id)
                await watcher.bootstrap(scene.overlay.addrs)
                while (found := await watcher.get_record(key)) is None:
                    await trio.sleep(0.05)
                assert is_live(open_worker_record(found), time.time())
            while (found := await watcher.get_record(key)) and is_live(open_worker_record(found), time.time()):
                await trio.sleep(0.05)
            assert found is None or open_worker_record(found).expires_at <= time.time()


async def test_a_worker_that_leaves_says_so_and_takes_no_orders(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (await scene.record()).leaving
    monkeypatch.setattr(scene.worker.jobs, "until_served", trio.sleep_forever)
    with trio.fail_after(10):
        await scene.worker.leave(0.1)
    assert (await scene.record()).leaving
    assert await scene.order() == "leaving"


@pytest.mark.parametrize("fault", [ModelError("bad weights"), KeyError("rope_theta"), OSError("disk")])
async def test_a_load_that_fails_leaves_a_worker_that_takes_the_next_order(scene: Scene, fault: Exception) -> None:
    scene.loader.go.set()
    scene.loader.faults = [fault]
    assert await scene.order(0, 2) == ""
    await scene.until("")
    assert await scene.order(0, 2) == "load_failed"  # not again and again; the coordinator may ask somebody else
    assert await scene.order(2, 4) == ""
    await scene.until("loaded")


async def test_layers_that_failed_are_tried_again_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.worker._AFTER_FAILURE_S", 0.0)
    scene.loader.go.set()
    scene.loader.faults = [ModelError("bad weights")]
    assert await scene.order() == ""
    await scene.until("")
    assert await scene.order() == ""
    await scene.until("loaded")


async def test_many_orders_at_once_are_one(scene: Scene) -> None:
    answers: list[str] = []

    async def give(number: int) -> None:
        answers.append(await scene.order(number, number + 1))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(give, number)
    assert answers.count("") == 1
    assert set(answers) <= {"", "loading", "stale"}


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("expired", {"expires_at": 1_000}),
        ("wrong_range", {"end": 0}),
        ("not_for_me", {"worker": identity(7).peer_id}),
        ("wrong_signer", {"coordinator": identity(7).peer_id}),
        ("wrong_dtype", {"dtype": "bfloat16"}),
        ("stale", {"sequence": 0}),
    ],
)
async def test_refused_orders(scene: Scene, code: str, changes: dict[str, Any]) -> None:
    scene.loader.go.set()
    await scene.order()
    await scene.until("loaded")
    assert await scene.order(**({"start": 0, "end": 3} | changes)) == code
    await scene.until("loaded")


async def test_a_coordinator_whose_clock_is_ahead_shuts_no_other_out(scene: Scene) -> None:
    scene.loader.go.set()
    assert await scene.order(sequence=2**50, by=98) == ""
    await scene.until("loaded")
    assert await scene.order(by=99) == ""


async def test_its_layers_are_one_coordinators_while_that_is_connected(scene: Scene) -> None:
    scene.loader.go.set()
    assert await scene.order(by=98) == ""
    await scene.until("loaded")
    assert await scene.order(1, 3, by=99) == "assigned"
    assert await scene.order(by=99) == ""  # the same layers: nothing changes
    assert (await scene.record()).assigned_by == identity(98).peer_id
    assert await scene.order(2, 4, by=98) == ""
    await scene.until("loaded")
    await scene.coordinators[98].disconnect(scene.overlay.peer_id)
    while (await scene.record()).assigned_by:
        await trio.sleep(0.01)
    assert await scene.order(1, 3, by=99) == ""
    assert (await scene.record()).assigned_by == identity(99).peer_id


async def test_a_change_while_a_record_travels_is_told_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[WorkerRecord] = []
    may_end = trio.Event()

    async def put_slowly(key: str, record: bytes) -> None:
        told.append(open_worker_record(record))
        await may_end.wait()

    monkeypatch.setattr(scene.overlay, "put_record", put_slowly)
    scene.worker._changed.set()
    while not told:
        await trio.sleep(0.01)
    scene.loader.go.set()
    await scene.order()
    await scene.until("loaded")
    may_end.set()
    with trio.fail_after(10):
        while not told[-1].ranges:
            await trio.sleep(0.01)


@pytest.mark.parametrize("error", [InputError("a newer record is stored", code="stale_record"), AzuError("any")])
async def test_a_record_that_nobody_takes_ends_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: AzuError
) -> None:
    async def refuse(key: str, record: bytes) -> None:
        raise error

    monkeypatch.setattr(scene.overlay, "put_record", refuse)
    scene.worker._changed.set()
    await trio.sleep(0.1)
    assert (await scene.record()).peer_id == scene.overlay.peer_id


async def test_a_record_that_nobody_took_is_offered_again_soon(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[bytes] = []

    async def refuse(key: str, record: bytes) -> None:
        offered.append(record)
        raise NetworkError("no peer stored it", code="not_stored")

    monkeypatch.setattr("node.worker._RETRY_S", 0.01)
    monkeypatch.setattr(scene.overlay, "put_record", refuse)
    scene.worker._changed.set()
    with trio.fail_after(10):
        while len(offered) < 3:
            await trio.sleep(0.01)


async def test_its_owner_sees_what_it_does_for_as_long_as_it_runs(scene: Scene, tmp_path: Path) -> None:
    async def page() -> str:
        status = await trio.to_thread.run_sync(fetch_status, tmp_path)
        assert status["peer_id"] == scene.overlay.peer_id
        return show_status(status)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_report, scene.worker, scene.overlay, "127.0.0.1:0", tmp_path)
        assert "  layers    none: the log says why" in await page()
        await scene.order()
        assert "  layers    0-1 of aaaaaaaaaaaa are being loaded, 0% are here" in await page()
        scene.loader.go.set()
        await scene.until("loaded")
        shown = await page()
        assert "  layers    0-1 of aaaaaaaaaaaa, 0.00 ms per token and layer when loaded" in shown
        assert "  speed     not measured yet; 0.0 steps wait for a pass" in shown
        assert "  links     " in shown
        assert "  kv cache  0 of 32 tokens reserved, 32 free, 0 filled" in shown
        assert "  jobs      0 running, 32 at most, 0 since the start" in shown
        nursery.cancel_scope.cancel()
    with pytest.raises(NetworkError) as caught:
        fetch_status(tmp_path)
    assert caught.value.code == "not_running"
