"""The view of the swarm: what hostile names and hostile records cannot do to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from azu.channel import Channel
from azu.errors import NetworkError
from azu.overlay import PROVIDER_SECONDS, OverlayStream
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, Status
from coordinator import swarm as swarm_module
from coordinator.swarm import SwarmView
from tests.coordinator.fake_workers import honest, opened, swarm_of


async def test_names_that_nobody_answers_to_are_bounded_and_cost_no_live_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_module, "_MAX_CONTACTS", 20)
    monkeypatch.setattr(swarm_module, "_MAX_STRANGERS", 4)
    async with swarm_of(tmp_path, (0, 4, honest)) as swarm:
        for number in range(100):
            swarm.view._meet(f"12D3KooWnobody{number}")
        assert len(swarm.view._contacts) == 20
        asked = [contact.asking for contact in swarm.view._contacts.values()]
        assert sum(asked) <= 5
        await trio.sleep(2.5)
        assert [worker.peer_id for worker in swarm.view.workers()] == [swarm.workers[0].peer_id]
        # The silent make room for the new.
        swarm.view._meet("12D3KooWnewcomer")
        assert "12D3KooWnewcomer" in swarm.view._contacts
        assert len(swarm.view._contacts) == 20


async def test_the_newest_strangers_are_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_module, "_MAX_STRANGERS", 2)
    view = SwarmView(None)  # type: ignore[arg-type]
    for name, pause in (("old", 300.0), ("older", 300.0), ("new", 0.0)):
        view._meet(name)
        view._contacts[name].pause = pause
    assert [name for name, _ in view._due()] == ["new", "old"]


async def test_who_is_silent_and_named_by_nobody_any_more_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    view = SwarmView(None)  # type: ignore[arg-type]
    for name in ("gone", "named", "asked"):
        view._meet(name)
    view._contacts["asked"].asking = True
    await trio.sleep(PROVIDER_SECONDS / 2)
    view._meet("named")
    view._forget()
    assert set(view._contacts) == {"gone", "named", "asked"}
    await trio.sleep(PROVIDER_SECONDS / 2 + 1)
    view._forget()
    assert set(view._contacts) == {"named", "asked"}


async def test_a_large_swarm_is_asked_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_module, "_ASKS_PER_S", 0.1)  # so that one worker is as many as fifty in ten seconds
    async with swarm_of(tmp_path, (0, 4, honest)) as swarm:
        contact = swarm.view._contacts[swarm.workers[0].peer_id]
        contact.next_try = 0.0
        while not contact.next_try:
            await trio.sleep(0.05)
        assert contact.next_try - trio.current_time() > 5
        assert not swarm.view._due()


async def test_a_worker_that_shows_anothers_record_is_counted_and_no_worker(tmp_path: Path) -> None:
    async with swarm_of(tmp_path, (0, 4, honest)) as swarm, opened(50) as liar:

        async def lie(stream: OverlayStream) -> None:
            channel = Channel(stream, CONTROL)
            await channel.receive()
            await channel.send(Status(), swarm.workers[0].record())

        liar.handle(CONTROL_PROTOCOL, lie)
        await swarm.overlay.connect(liar.peer_id, liar.addrs)
        swarm.view._meet(liar.peer_id)
        while not swarm.overlay.statistics().violations:
            await trio.sleep(0.05)
        assert swarm.overlay.statistics().violations == {liar.peer_id: 1}
        assert len(swarm.view.workers()) == 1


async def test_faults_add_up_and_are_forgiven(autojump_clock: trio.testing.MockClock) -> None:
    view = SwarmView(None)  # type: ignore[arg-type]
    view._meet("worker")
    error = NetworkError("it failed")
    view.blame("stranger", 2, error)
    assert view.faults("worker") == view.faults("stranger") == 0
    view.blame("worker", 2, error)
    view.blame("worker", 1, error)
    assert view.faults("worker") == 3
    await trio.sleep(200)
    assert view.faults("worker") == 0
    for _ in range(100):
        view.blame("worker", 2, error)
    assert view.faults("worker") == 10
