"""The scheduler alone, against simulated peers: nothing is lost, nothing is fetched twice, nobody holds up the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.distribution.schedule import Piece, Schedule

DEPTH = 2
A, B, C = "a", "b", "c"


def schedule_of(files: Mapping[str, int], ranks: str = "") -> Schedule:
    """`files` by their number of pieces; in a tie those named first in `ranks` come first."""
    return Schedule(
        {digest: range(pieces) for digest, pieces in files.items()},
        {digest: ranks.find(digest) % 100 for digest in files},
        depth=DEPTH,
    )


def take(schedule: Schedule, peer: str, now: float = 0.0) -> list[Piece]:
    """All that may be asked of a peer at once."""
    taken = []
    while (piece := schedule.next(peer, now)) is not None:
        taken.append(piece)
    return taken


def bring(schedule: Schedule, peer: str, piece: Piece, now: float = 0.0) -> bool:
    """A piece comes and is stored; whether its file is whole with it."""
    assert schedule.received(peer, piece, now)
    return schedule.stored(piece)


def test_pieces_come_in_order_and_not_too_many_at_once() -> None:
    schedule = schedule_of({"x": 3})
    assert take(schedule, A) == [], "nobody knows what it has"
    schedule.offer(A, {"x": 0})
    assert take(schedule, A) == [Piece("x", 0), Piece("x", 1)]
    assert not bring(schedule, A, Piece("x", 0))
    assert take(schedule, A) == [Piece("x", 2)]
    assert schedule.missing == ["x"]
    assert not bring(schedule, A, Piece("x", 1))
    assert bring(schedule, A, Piece("x", 2))
    assert schedule.missing == []


def test_the_rarest_file_is_begun_first() -> None:
    schedule = schedule_of({"x": 2, "y": 2, "z": 2}, "xyz")
    schedule.offer(A, {"x": 0, "y": 0, "z": 0})
    schedule.offer(B, {"x": 0, "y": 0})
    schedule.offer(C, {"x": 0})
    assert take(schedule, A) == [Piece("z", 0), Piece("z", 1)]
    assert take(schedule, B) == [Piece("y", 0), Piece("y", 1)]


def test_among_equally_rare_files_what_was_given_out_least_comes_first_and_then_the_rank() -> None:
    schedule = schedule_of({"x": 1, "y": 1, "z": 1}, "xyz")
    schedule.offer(A, {"x": 3, "y": 1, "z": 1})
    assert take(schedule, A) == [Piece("y", 0), Piece("z", 0)]


def test_a_file_that_is_begun_is_finished_first() -> None:
    schedule = schedule_of({"x": 3, "y": 3}, "xy")
    schedule.offer(A, {"x": 0})
    schedule.offer(B, {"x": 0, "y": 0})
    assert take(schedule, A) == [Piece("x", 0), Piece("x", 1)]
    assert take(schedule, B) == [Piece("x", 2), Piece("y", 0)]  # though y is rarer


def test_what_a_peer_owes_goes_to_another_when_it_is_dropped() -> None:
    schedule = schedule_of({"x": 2})
    schedule.offer(A, {"x": 0})
    schedule.offer(B, {"x": 0})
    take(schedule, A)
    assert schedule.received(A, Piece("x", 0), 0.0)
    schedule.drop(A)
    assert take(schedule, B) == [Piece("x", 1)], "what had come is not asked for again"
    schedule.failed(A, Piece("x", 0))  # and its bytes were wrong
    assert take(schedule, B) == [Piece("x", 0)]


def test_late_pieces_are_asked_of_a_second_peer_and_count_once() -> None:
    schedule = schedule_of({"x": 2})
    for peer in (A, B, C):
        schedule.offer(peer, {"x": 0})
    assert len(take(schedule, A, now=0.0)) == 2
    assert take(schedule, B, now=0.5) == [], "too soon"
    assert take(schedule, B, now=5.0) == [Piece("x", 0), Piece("x", 1)]
    assert take(schedule, C, now=9.0) == [], "two are enough"
    assert schedule.received(B, Piece("x", 0), 5.1)
    assert not schedule.received(A, Piece("x", 0), 5.1), "the other one is just being stored"
    schedule.stored(Piece("x", 0))
    assert bring(schedule, A, Piece("x", 1), 5.2)
    assert not schedule.received(B, Piece("x", 1), 5.3)
    assert schedule.missing == []


def test_a_slow_peer_waits_longer_before_it_takes_what_others_owe() -> None:
    schedule = schedule_of({"x": 1, "y": 2})
    schedule.offer(A, {"x": 0})
    assert take(schedule, A, now=0.0) == [Piece("x", 0)]
    bring(schedule, A, Piece("x", 0), now=10.0)  # ten seconds for a piece
    schedule.offer(B, {"y": 0})
    take(schedule, B, now=10.0)
    schedule.offer(A, {"y": 0})
    assert take(schedule, A, now=25.0) == []
    assert len(take(schedule, A, now=31.0)) == 2


def test_claimed_and_completed_files() -> None:
    schedule = schedule_of({"x": 2, "y": 1}, "xy")
    assert schedule.orphans == ["x", "y"]
    schedule.claim("x", True)
    schedule.offer(A, {"x": 0, "y": 0})
    assert schedule.orphans == []
    assert take(schedule, A) == [Piece("y", 0)]
    schedule.claim("x", False)
    assert take(schedule, A) == [Piece("x", 0)]
    schedule.completed("x")
    assert schedule.missing == ["y"]
    assert not schedule.received(A, Piece("x", 0), 0.0)
    schedule.drop(A)
    assert schedule.orphans == ["y"]


@pytest.mark.parametrize("peer", [A, B])
def test_strangers_and_what_was_not_asked_for(peer: str) -> None:
    schedule = schedule_of({"x": 1})
    schedule.offer(A, {"x": 0, "another model's": 0})
    assert not schedule.received(peer, Piece("x", 0), 0.0)
    schedule.failed(peer, Piece("x", 0))
    assert take(schedule, A) == [Piece("x", 0)]


FATES = ("comes", "is wrong", "peer dies", "peer is slow")


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    holdings=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=4),
    fates=st.lists(st.sampled_from(FATES), max_size=60),
    choices=st.lists(st.integers(0, 10_000), min_size=1, max_size=40),
)
def test_whatever_befalls_every_piece_is_stored_once(
    sizes: list[int], holdings: list[set[int]], fates: Sequence[str], choices: list[int]
) -> None:
    files = {f"file {number}": size for number, size in enumerate(sizes)}
    peers = {f"peer {number}": {f"file {each}": 0 for each in held} for number, held in enumerate(holdings)}
    peers["the publisher"] = dict.fromkeys(files, 0)
    schedule = schedule_of(files)
    flying: dict[str, list[Piece]] = {peer: [] for peer in peers}
    for peer, held in peers.items():
        schedule.offer(peer, held)
    stored: Counter[Piece] = Counter()
    whole: Counter[str] = Counter()
    now, steps = 0.0, 0
    while schedule.missing:
        now, steps = now + 1.0, steps + 1
        assert steps < 2_000, "it does not come to an end"
        for peer in peers:
            asked = take(schedule, peer, now)
            assert all(piece.digest in peers[peer] for piece in asked)
            flying[peer] += asked
            assert len(flying[peer]) <= DEPTH
        busy = [peer for peer in peers if flying[peer]]
        peer = busy[choices[steps % len(choices)] % len(busy)]
        fate = fates[steps] if steps < len(fates) else "comes"
        if fate == "peer is slow":
            continue
        if fate == "peer dies":
            flying[peer].clear()
            schedule.drop(peer)
            schedule.offer(peer, peers[peer])
            continue
        piece = flying[peer].pop(0)
        if not schedule.received(peer, piece, now):
            assert stored[piece], "a piece that is missing was turned away"
        elif fate == "is wrong":
            schedule.failed(peer, piece)
        else:
            stored[piece] += 1
            whole[piece.digest] += schedule.stored(piece)
    assert stored == Counter(Piece(digest, index) for digest, size in files.items() for index in range(size))
    assert whole == Counter(files.keys())
