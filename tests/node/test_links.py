"""What a worker says of its lines: bounded, smoothed, forgotten in time; and measured over real overlays."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from azu.records import MAX_LINKS, Link
from node import links as links_module
from node.links import Links, keep_pinging
from tests.node.real_stages import TinyModel, identity, prompt_of, real_ring, tiny_model

PEERS = [identity(number).peer_id for number in range(1, 41)]
ONE, TWO, THREE = PEERS[:3]
LARGE = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_measurements_are_smoothed() -> None:
    links = Links()
    links.note_ping(ONE, 0.010, is_relayed=False, now=0.0)
    assert links.told(0.0) == (Link(peer_id=ONE, rtt_us=10_000),)
    links.note_ping(ONE, 0.020, is_relayed=False, now=1.0)
    links.note_sent(ONE, LARGE, 0.1, is_relayed=False, now=2.0)
    links.note_sent(ONE, LARGE, 0.2, is_relayed=False, now=3.0)
    links.note_sent(ONE, 100, 5.0, is_relayed=False, now=4.0)  # too small to tell a line's speed
    rate = 10 * LARGE + (5 * LARGE - 10 * LARGE) * 0.3
    assert links.told(5.0) == (Link(peer_id=ONE, rtt_us=13_000, bytes_per_s=round(rate)),)


def test_a_line_that_leaves_its_relay_is_another_line() -> None:
    links = Links()
    links.note_ping(ONE, 0.2, is_relayed=True, now=0.0)
    assert links.told(1.0) == (Link(peer_id=ONE, rtt_us=200_000, relayed=True),)
    links.note_ping(ONE, 0.02, is_relayed=False, now=2.0)
    assert links.told(3.0) == (Link(peer_id=ONE, rtt_us=20_000),)


def test_what_was_not_measured_lately_is_not_told() -> None:
    links = Links()
    links.note_ping(ONE, 0.01, is_relayed=False, now=0.0)
    links.note_ping(TWO, None, is_relayed=False, now=0.0)
    links.note_sent(THREE, 100, 0.1, is_relayed=False, now=0.0)
    assert [link.peer_id for link in links.told(599.0)] == [ONE]
    links.note_ping(ONE, None, is_relayed=False, now=599.0)
    assert links.told(600.0) == ()


def test_who_is_pinged_next() -> None:
    links = Links()
    assert links.due(PEERS[:9], 0.0) == PEERS[:4]
    for peer_id in PEERS[:4]:
        links.note_ping(peer_id, 0.01, is_relayed=False, now=0.0)
    links.note_sent(PEERS[8], 100, 0.1, is_relayed=False, now=1.0)
    assert links.due(PEERS[:9], 15.0) == [PEERS[8], *PEERS[4:7]]
    assert links.due(PEERS[:4], 59.0) == []
    assert links.due([ONE, ONE], 60.0) == [ONE]


@given(st.lists(st.tuples(st.integers(0, 39), st.booleans(), st.floats(0.0, 1e4)), max_size=120))
def test_there_are_never_too_many(events: list[tuple[int, bool, float]]) -> None:
    links = Links()
    now = 0.0
    for number, is_ping, value in events:
        now += 1.0
        if is_ping:
            links.note_ping(PEERS[number], value, is_relayed=False, now=now)
        else:
            links.note_sent(PEERS[number], LARGE, value, is_relayed=True, now=now)
        assert len(links.peers) <= MAX_LINKS
        assert len(links.told(now)) <= MAX_LINKS


def test_peers_of_a_ring_stay() -> None:
    links = Links()
    links.note_sent(ONE, 100, 0.1, is_relayed=False, now=0.0)
    for number, peer_id in enumerate(PEERS[1:]):
        links.note_ping(peer_id, 0.01, is_relayed=False, now=1.0 + number)
    assert set(links.peers) == {ONE, *PEERS[-MAX_LINKS + 1 :]}


async def test_real_stages_measure_each_other(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring's traffic shows the bandwidth in its own direction, and pings the time there and back."""
    monkeypatch.setattr(links_module, "_LARGE_BYTES", 16 << 10)
    monkeypatch.setattr(links_module, "_ROUND_S", 0.05)
    async with real_ring(model, 2) as coordinator:
        first, last = coordinator.stages
        end = await coordinator.answer(coordinator.ticket(600, 4), prompt_of(600))
        assert not end.failures
        measured = [stage.jobs.meter.links for stage in (first, last)]
        assert set(measured[0].peers) == {last.peer_id}
        assert set(measured[1].peers) == {first.peer_id}
        [link] = measured[0].told(trio.current_time())
        assert link.bytes_per_s > 0
        assert measured[1].told(trio.current_time()) == ()  # tokens only

        async with trio.open_nursery() as nursery:
            for stage, links in zip((first, last), measured, strict=True):
                nursery.start_soon(keep_pinging, stage.overlay, links)
            while not all(any(link.rtt_us for link in links.told(trio.current_time())) for links in measured):
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        for links, other in zip(measured, (last, first), strict=True):
            [link] = [link for link in links.told(trio.current_time()) if link.peer_id == other.peer_id]
            assert 0 < link.rtt_us < 10_000_000
            assert not link.relayed
