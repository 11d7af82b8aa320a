"""When a job leaves a slow worker: by its own word and the coordinator's clock, where that pays, and seldom."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.hedging import Hedging, Offer, Slow, is_worth_it

USUAL = {"a": 0.02, "b": 0.03, "c": 0.02}  # seconds of a step in each stage
LINES = 0.03  # and what a trip takes besides


class Job:
    """A ring in which steps and lines take as long as a test says; looked at once a second, as in `coordinator`."""

    def __init__(self) -> None:
        self.hedging = Hedging()
        self.now = self.told_at = 0.0
        self.tokens = 0

    def look(self, told: Mapping[str, float], trip_s: float) -> Slow | None:
        """What is found after a second in which stages say that steps take so long, and a token really `trip_s`."""
        self.now += 1.0
        while self.told_at + trip_s <= self.now:
            self.told_at += trip_s
            self.tokens += 1
        return self.hedging.look(self.tokens, self.told_at, told)

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
