"""Who is alive, as others see it: by beats alone, and never by a clock of somebody else."""

from __future__ import annotations

from azu.accounts.presence import LEASE_S, Watch


def test_whoever_beats_is_alive_and_whoever_stops_is_gone_after_the_lease() -> None:
    watch, now = Watch(), 1000.0
    for number in range(20):
        assert watch.look({"a": number, "b": 5}, now) >= {"a"}
        now += 1.0
    assert watch.look({"a": 20, "b": 5}, now) == {"a"}
    assert watch.look({"a": 20, "b": 6}, now + 1) == {"a", "b"}, "it is back"
    assert watch.look({"b": 6}, now + 2) == {"b"}, "it has taken itself off the list"
    assert (watch.beat_of("a"), watch.beat_of("b")) == (None, 6)


def test_nobody_is_gone_before_the_whole_lease_was_seen() -> None:
    watch, first = Watch(), 50.0
    seen = {round(after, 1): watch.look({"a": 1}, first + after) for after in (0.0, 4.0, 8.0, LEASE_S - 0.1)}
    assert all(alive == {"a"} for alive in seen.values())
    assert watch.look({"a": 1}, first + LEASE_S) == set()


def test_whoever_did_not_look_for_a_while_tells_nobodys_silence_from_its_own() -> None:
    watch = Watch()
    watch.look({"a": 1}, 0.0)
    assert watch.look({"a": 1}, 600.0) == {"a"}
    assert watch.look({"a": 1}, 604.0) == {"a"}
    assert watch.look({"a": 1}, 608.0) == {"a"}
    assert watch.look({"a": 1}, 600.0 + LEASE_S) == set()


def test_a_beat_may_begin_anew() -> None:
    """A coordinator that is restarted after others have taken it off the list."""
    watch = Watch()
    watch.look({"a": 70}, 0.0)
    watch.look({"a": 70}, 4.0)
    watch.look({"a": 1}, 8.0)
    assert watch.look({"a": 1}, 12.0) == {"a"}
