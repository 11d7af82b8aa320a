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


def test_bandwidth_is_smoothed_and_of_three_round_trips_the_shortest_counts() -> None:
    links = Links()
    links.note_ping(ONE, 0.020, is_relayed=False, now=0.0)
    assert links.told(0.0) == (Link(peer_id=ONE, rtt_us=20_000),)
    links.note_ping(ONE, 0.010, is_relayed=False, now=1.0)
    links.note_sent(ONE, LARGE, 0.1, is_relayed=False, now=2.0)
    links.note_sent(ONE, LARGE, 0.2, is_relayed=False, now=3.0)
    links.note_sent(ONE, 100, 5.0, is_relayed=False, now=4.0)  # too small to tell a line's speed
    rate = 10 * LARGE + (5 * LARGE - 10 * LARGE) * 0.3
    assert links.told(5.0) == (Link(peer_id=ONE, rtt_us=10_000, bytes_per_s=round(rate)),)


def test_pings_that_took_long_now_and_then_are_none_and_a_line_that_has_become_slow_is_told() -> None:
    links = Links()
    told: list[int] = []
    for number, rtt_s in enumerate([0.01, 2.0, 2.0, 0.01, 0.5, 0.5, 0.5]):
        links.note_ping(ONE, rtt_s, is_relayed=False, now=float(number))
        told += [link.rtt_us // 1000 for link in links.told(float(number))]
    assert told == [10] * 6 + [500]


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


def pinged(links: Links, now: float, *peers: str) -> None:
    for peer_id in peers:
        links.note_ping(peer_id, 0.01, is_relayed=False, now=now)


def test_who_is_pinged_next() -> None:
    links = Links()
    assert links.due(PEERS[:9], 0.0) == [ONE, TWO]
    for now in (0.0, 3.0, 6.0):  # three pings of who is new, ...
        assert links.due([ONE, TWO], now) == [ONE, TWO]
        pinged(links, now, ONE, TWO)
        assert links.due([ONE, TWO], now + 2.9) == []
    assert links.due([ONE, TWO, THREE], 9.0) == [THREE]
    assert links.due([ONE, TWO], 65.9) == []
    assert links.due([TWO, ONE, ONE], 66.0) == [TWO, ONE]  # ... and then one each minute


def test_neighbours_in_a_running_ring_are_pinged_every_three_seconds() -> None:
    links = Links()
    for now in (0.0, 3.0, 6.0):
        pinged(links, now, ONE, *PEERS[10:17])
    links.note_sent(PEERS[10], 100, 0.1, is_relayed=False, now=66.0)
    for peer_id in PEERS[11:17]:
        links.note_heard(peer_id, 66.0)
    assert links.due([ONE, *PEERS[10:17]], 66.0) == [*PEERS[10:14], ONE]
    pinged(links, 66.0, *PEERS[10:14])
    assert links.due(PEERS[10:17], 67.0) == PEERS[14:17]
    assert links.due(PEERS[10:14], 68.9) == []
    assert links.due(PEERS[10:14], 69.0) == PEERS[10:14]
    assert links.due(PEERS[10:14], 76.0) == [], "no ring has used them for ten seconds"


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
    async with real_ring(model, 3) as coordinator:
        stages = _, middle, last = coordinator.stages
        end = await coordinator.answer(coordinator.ticket(600, 4), prompt_of(600))
        assert not end.failures
        measured = [stage.jobs.meter.links for stage in stages]
        # Those that it sends to, and those that it hears from.
        assert [set(links.peers) for links in measured] == [
            {stage.peer_id for stage in stages if stage is not me} for me in stages
        ]
        told = [links.told(trio.current_time()) for links in measured]
        assert [[link.peer_id for link in each] for each in told] == [[middle.peer_id], [last.peer_id], []]
        assert told[0][0].bytes_per_s > 0
        assert told[1][0].bytes_per_s > 0

        async with trio.open_nursery() as nursery:
            for stage, links in zip(stages, measured, strict=True):
                nursery.start_soon(keep_pinging, stage.overlay, links)
            while not all(sum(link.rtt_us > 0 for link in links.told(trio.current_time())) == 2 for links in measured):
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        for link in measured[0].told(trio.current_time()):
            assert link.peer_id in {middle.peer_id, last.peer_id}
            assert 0 < link.rtt_us < 10_000_000
            assert not link.relayed
