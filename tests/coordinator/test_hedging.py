"""When a job leaves a slow worker, or one with a slow line: by its own word and the coordinator's clock, where that
pays, and seldom.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.hedging import Hedging, Offer, Part, Reading, Slow, is_worth_it

USUAL = {"a": 0.02, "b": 0.03, "c": 0.02}  # seconds of a step in each stage
LINES = 0.03  # and what a trip takes besides
AB, BC, CA = ("a", "b"), ("b", "c"), ("c", "a")


class Job:
    """A ring in which steps and lines take as long as a test says; looked at once a second, as in `coordinator`."""

    def __init__(self) -> None:
        self.hedging = Hedging()
        self.now = self.told_at = 0.0
        self.tokens = 0

    def look(self, told: Mapping[str, float], trip_s: float) -> Slow | None:
        """What is found after a second in which stages say that steps take so long, and a token really `trip_s`."""
        return next(
            iter(self.see({Part(peer_id, "pass"): Reading(step_s) for peer_id, step_s in told.items()}, trip_s)), None
        )

    def see(self, parts: Mapping[Part, Reading], trip_s: float) -> list[Slow]:
        """All that are found, the slowest first."""
        self.now += 1.0
        while self.told_at + trip_s <= self.now:
            self.told_at += trip_s
            self.tokens += 1
        return self.hedging.look(self.tokens, self.told_at, parts)

    def go_far(self, looks: int, lines: Mapping[tuple[str, str], float]) -> list[list[str]]:
        """Who is found at each look while lines between stages take so long: each of both ends says so."""
        parts = {Part(peer_id, "pass"): Reading(step_s) for peer_id, step_s in USUAL.items()}
        for (one, other), line_s in lines.items():
            parts |= {Part(one, "line", other): Reading(line_s), Part(other, "line", one): Reading(line_s)}
        trip_s = sum(USUAL.values()) + sum(lines.values())
        return [[slow.peer_id for slow in self.see(parts, trip_s)] for _ in range(looks)]

    def go(self, looks: int, **slower: float) -> list[Slow | None]:
        """What is found while some stages are slower than usual, and so is the job."""
        steps = USUAL | slower
        return [self.look(steps, LINES + sum(steps.values())) for _ in range(looks)]


def found(looks: list[Slow | None]) -> list[Slow]:
    return [each for each in looks if each is not None]


def test_a_stage_that_has_become_slow_is_found_and_its_times_with_it() -> None:
    job = Job()
    assert not found(job.go(10))
    [slow, *_] = found(job.go(10, b=0.5))
    assert (slow.peer_id, slow.step_s, slow.usual_s) == ("b", 0.5, pytest.approx(0.03))
    assert slow.late_s == pytest.approx(0.47, rel=0.01)


def test_it_takes_three_looks_in_a_row() -> None:
    job = Job()
    job.go(10)
    for _ in range(10):
        assert not found(job.go(2, b=0.5) + job.go(1))
    assert job.go(3, b=0.5)[-1] is not None


def test_what_is_slow_from_the_beginning_is_usual() -> None:
    assert not found(Job().go(50, b=0.5))


def test_a_stage_that_was_slow_for_long_is_still_slow() -> None:
    job = Job()
    job.go(10)
    assert all(found([each]) for each in job.go(300, b=0.5)[3:])


@given(st.dictionaries(st.sampled_from("abc"), st.floats(0.0, 100.0)))
def test_a_stage_can_say_what_it_likes_while_the_tokens_come_in_time(claims: dict[str, float]) -> None:
    job = Job()
    job.go(10)
    said = [job.look(USUAL | claims, LINES + sum(USUAL.values())) for _ in range(10)]
    late = [each for each in found(said) if each.step_s > each.usual_s + 0.01]  # a claim of nothing costs nobody
    assert not late


@given(st.floats(0.1, 5.0))
def test_tokens_that_come_late_are_nobodys_fault_where_no_pass_takes_longer(trip_s: float) -> None:
    """As when a prompt's chunks are computed, when a line is slow, or when tokens wait for each other."""
    job = Job()
    job.go(10)
    assert not found([job.look(USUAL, trip_s) for _ in range(20)])


@given(st.integers(0, 2**32))
def test_noise_is_not_taken_for_slowness(seed: int) -> None:
    chance, job = random.Random(seed), Job()
    for _ in range(100):
        steps = {peer_id: step_s * chance.uniform(1.0, 2.9) for peer_id, step_s in USUAL.items()}
        assert job.look(steps, LINES + sum(steps.values())) is None


def test_a_job_that_goes_from_one_slow_worker_to_the_next_stays_there() -> None:
    job, moves = Job(), 0
    names = ["b", "d", "e", "f", "g"]
    for _ in range(5):
        here = names[min(moves, len(names) - 1)]
        steps = {"a": 0.02, here: 0.03, "c": 0.02}
        for step_s in [0.03] * 6 + [1.0] * 20:
            slow = job.look(steps | {here: step_s}, 0.07 + step_s)
            if slow is not None:
                assert slow.peer_id == here
                job.hedging.moved(here)
                job.hedging.pause()
                moves += 1
                break
    assert moves == 2
    assert job.hedging.left == {"b", "d"}


def test_a_pause_is_not_held_against_anybody() -> None:
    job = Job()
    job.go(10)
    job.now += 30.0
    job.told_at += 30.0
    job.hedging.pause()
    assert not found(job.go(10))


def test_looks_without_a_token_count_as_one_with_those_that_follow() -> None:
    job = Job()
    job.go(10)
    looks = job.go(12, b=3.0)
    assert sum(each is not None for each in looks) <= 2  # three tokens, 3 s each
    assert found(looks)[0].late_s == pytest.approx(2.97, rel=0.01)


def test_a_stage_whose_own_line_has_become_slow_is_found() -> None:
    """It alone says so: its neighbour keeps the job."""
    job, steps = Job(), {Part(peer_id, "pass"): Reading(step_s) for peer_id, step_s in USUAL.items()}
    for _ in range(10):
        assert not job.see(steps | {Part("a", "line", "b"): Reading(0.02)}, 0.1)
    looks = [job.see(steps | {Part("a", "line", "b"): Reading(0.3)}, 0.38) for _ in range(4)]
    assert [len(found) for found in looks] == [0, 0, 1, 1]
    [slow] = looks[-1]
    assert slow.peer_id == "a"
    assert (slow.step_s, slow.usual_s) == (pytest.approx(0.32), pytest.approx(0.04))
    assert slow.late_s == pytest.approx(0.28, rel=0.02)


def test_who_is_slow_to_all_its_neighbours_is_left_rather_than_these() -> None:
    job, near = Job(), {AB: 0.01, BC: 0.01, CA: 0.01}
    assert not any(job.go_far(10, near))
    assert job.go_far(4, near | {AB: 0.2, BC: 0.2})[-1][0] == "b"


def test_one_slow_line_is_told_by_both_of_its_ends_and_either_may_be_left() -> None:
    job, near = Job(), {AB: 0.01, BC: 0.01, CA: 0.01}
    assert not any(job.go_far(10, near))
    assert sorted(job.go_far(4, near | {BC: 0.3})[-1]) == ["b", "c"]


def test_a_line_that_is_said_to_be_slow_while_the_tokens_come_in_time_is_none() -> None:
    job, steps = Job(), {Part(peer_id, "pass"): Reading(step_s) for peer_id, step_s in USUAL.items()}
    for line_s in [0.01] * 10 + [0.5] * 20:
        assert not job.see(steps | {Part("a", "line", "b"): Reading(line_s)}, 0.1)


def test_lines_that_are_fast_all_the_same_are_not_slow() -> None:
    job, near = Job(), {AB: 0.0002, BC: 0.0002, CA: 0.0002}
    assert not any(job.go_far(10, near) + job.go_far(10, dict.fromkeys(near, 0.019)))


def test_a_worker_that_becomes_slow_before_the_job_has_seen_it_otherwise_is_found_by_what_was_usual_before() -> None:
    """A job of 300 tokens is over before it could find out for itself what is usual."""
    job = Job()
    parts = {Part(peer_id, "pass"): Reading(step_s, step_s) for peer_id, step_s in USUAL.items()}
    assert not job.see(parts, 0.1)
    slow = parts | {Part("b", "pass"): Reading(0.5, 0.03)}
    looks = [job.see(slow, 0.57) for _ in range(8)]
    assert [len(found) for found in looks[:3]] == [0, 0, 1]
    assert [slow.peer_id for slow in looks[-1]] == ["b"]
    assert looks[-1][0].late_s == pytest.approx(0.5, rel=0.1)


@given(st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_what_a_young_job_is_told_of_now_and_before_has_to_agree_with_its_tokens(now_s: float, before_s: float) -> None:
    """Who says that it was fast and is slow now is not believed where tokens come sooner than it says."""
    job = Job()
    parts = {Part(peer_id, "pass"): Reading(step_s, step_s) for peer_id, step_s in USUAL.items()}
    parts[Part("b", "pass")] = Reading(now_s, before_s)
    for _ in range(10):
        found = job.see(parts, 0.1)
        assert not found or now_s - before_s <= 2 * (0.1 - before_s)


def test_a_worker_that_answers_the_coordinator_late_is_found_whatever_it_says() -> None:
    """One that is stopped again and again, but not while it computes, does not see that itself."""
    job = Job()
    parts = {Part(peer_id, "pass"): Reading(step_s, step_s) for peer_id, step_s in USUAL.items()}
    for _ in range(5):
        assert not job.see(parts | {Part("b", "answer"): Reading(0.002, 0.002)}, 0.1)
    looks = [job.see(parts | {Part("b", "answer"): Reading(0.04, 0.002)}, 0.14) for _ in range(4)]
    assert [[slow.peer_id for slow in found] for found in looks] == [[], [], ["b"], ["b"]]


times = st.floats(0.0, 1e3)


@given(times, times, times, times, st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_move_saves_three_times_what_it_costs(
    step_s: float, late_s: float, promised_s: float, replay_s: float, done: int, left: int
) -> None:
    slow, offer = Slow("b", step_s, 0.0, late_s), Offer(promised_s, replay_s)
    if is_worth_it(slow, offer, done=done, left=left):
        assert left * (step_s - promised_s) > 3 * replay_s
        assert left * late_s > 3 * replay_s
        assert promised_s < step_s
        assert is_worth_it(slow, offer, done=done + 1, left=left + 1)


def test_a_job_that_is_nearly_done_stays() -> None:
    slow, offer = Slow("b", 0.5, 0.03, 0.47), Offer(0.03, 0.5)
    assert is_worth_it(slow, offer, done=200, left=200)
    assert not is_worth_it(slow, offer, done=200, left=10)
    assert not is_worth_it(slow, offer, done=10, left=2_000)
