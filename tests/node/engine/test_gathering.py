"""Whom a pass waits for: a ring of stages in simulated time, on one machine and on several."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.engine.gathering import Gathering


class Fixed(Gathering):
    """Tries nothing."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def _measure(self, now: float) -> None:
        pass


@dataclass
class Ring:
    """Stages whose pass over n tokens takes `base + each * n` seconds, and `hop` seconds from one to the next.

    shared: they compute on one machine, each as fast as the others leave it.
    """

    base: float
    each: float
    hop: float
    shared: bool
    stages: int = 3
    jobs: int = 16
    gathering: Gathering = field(default_factory=Gathering)

    def run(self, seconds: float) -> float:
        """Tokens per second."""
        now, made = 0.0, 0
        queues: list[list[tuple[float, int]]] = [[] for _ in range(self.stages)]  # when it came, job
        running: dict[int, tuple[float, list[int]]] = {}  # stage -> seconds of work left, jobs
        flying = [(0.013 * job, 0, job) for job in range(self.jobs)]  # when it comes, stage, job
        while now < seconds:
            alarm = math.inf
            for stage, queue in enumerate(queues):
                if queue and stage not in running:
                    wait = self.gathering.patience(queue[0][0], now) if stage == 0 else 0.0
                    if wait > 1e-12:
                        alarm = min(alarm, now + wait)
                    else:
                        taken = queue[: self.gathering.size] if stage == 0 else queue
                        running[stage] = (self.base + self.each * len(taken), [job for _, job in taken])
                        queues[stage] = queue[len(taken) :]
            slow = len(running) if self.shared else 1
            ends = min((left * slow for left, _ in running.values()), default=math.inf)
            step = min(now + ends, alarm, min(flying)[0] if flying else math.inf) - now
            now += step
            running = {stage: (left - step / slow, jobs) for stage, (left, jobs) in running.items()}
            for stage in [stage for stage, (left, _) in running.items() if left < 1e-9]:
                _, jobs = running.pop(stage)
                flying += [(now + self.hop, (stage + 1) % self.stages, job) for job in jobs]
                made += len(jobs) if stage == self.stages - 1 else 0
                if stage == 0:
                    self.gathering.left(jobs, 0, now)
            for item in [item for item in flying if item[0] <= now + 1e-9]:
                flying.remove(item)
                _, stage, job = item
                queues[stage].append((now, job))
                if stage == 0:
                    self.gathering.came(job, now)
        return made / now


RINGS = {
    "one machine": {"base": 0.016, "each": 0.002, "hop": 0.0005, "shared": True},
    "three machines": {"base": 0.016, "each": 0.002, "hop": 0.0005, "shared": False},
    "three machines that compute for long": {"base": 0.002, "each": 0.01, "hop": 0.0005, "shared": False},
    "far apart": {"base": 0.016, "each": 0.002, "hop": 0.08, "shared": False},
}


@pytest.mark.parametrize("kind", RINGS)
def test_it_finds_about_the_best_number(kind: str) -> None:
    rates = {groups: Ring(**RINGS[kind], gathering=Fixed(groups)).run(60) for groups in (1, 2, 3, 4, 8, 16)}  # type: ignore[arg-type]
    assert Ring(**RINGS[kind]).run(120) > 0.9 * max(rates.values()), rates  # type: ignore[arg-type]


def tried(
    seconds: Callable[[int, float], float], rounds: int = 400, prompts: Callable[[int], int] = lambda _: 0
) -> list[int]:
    """The groups in each round of 16 jobs' tokens, which takes `seconds` with so many groups at that time.

    prompts: the rows of prompts in each round.
    """
    gathering, now, found = Gathering(), 0.0, []
    for number in range(rounds):
        for job in range(16):
            gathering.came(job, now)
        found.append(gathering.groups)
        now += seconds(gathering.groups, now)
        gathering.left(range(16), prompts(number), now)
    return found


def test_a_number_that_is_much_worse_is_not_tried_for_long() -> None:
    runs = [(groups, len(list(run))) for groups, run in groupby(tried(lambda groups, _: 1.0 if groups == 2 else 1.3))]
    others = [length for groups, length in runs if groups != 2]
    assert len(others) > 3
    assert max(others[1:]) <= 5, runs  # the first is in force before anything is tried


def test_a_number_that_is_much_worse_is_tried_less_often_than_one_that_is_nearly_as_good() -> None:
    def detours(worse: float) -> int:
        found = tried(lambda groups, _: 1.0 if groups == 2 else worse, 1_000)
        return sum(1 for groups, _ in groupby(found) if groups != 2)

    assert detours(1.5) < detours(1.05) - 1


def test_what_was_found_with_some_jobs_holds_for_others_until_it_is_tried() -> None:
    gathering, now = Gathering(), 0.0

    def go(jobs: int, rounds: int) -> list[int]:
        nonlocal now
        found = []
        for _ in range(rounds):
            for job in range(jobs):
                gathering.came(job, now)
            found.append(gathering.groups)
            now += 1.0 if gathering.groups == 1 else 1.5
            gathering.left(range(jobs), 0, now)
        return found

    go(9, 10)  # one trial, of the number that is tried first
    assert go(16, 60)[-1] == 1
    for job in range(9, 16):
        gathering.forget(job)
    assert set(go(9, 10)[1:]) == {1}
    assert set(go(9, 200)) == {1, 2}, "that another number is no better with so many is found out all the same"
    for job in range(5, 9):
        gathering.forget(job)
    assert set(go(5, 18)[1:]) == {1}, "so is what was worse with others: it is tried later, and not at once"


def test_a_machine_that_is_faster_at_times_does_not_make_a_worse_number_seem_better() -> None:
    def seconds(groups: int, now: float) -> float:
        return (1.0 if groups == 2 else 1.05) * (1 + 0.4 * math.sin(now / 40))

    found = tried(seconds, 2_000)
    assert found.count(2) > 0.8 * len(found)


def test_where_prompts_never_end_a_trial_of_another_number_does() -> None:
    found = tried(lambda groups, _: 1.0 if groups == 2 else 1.05, prompts=lambda number: 100 if number > 12 else 0)
    assert found[13] != 2
    assert set(found[30:]) == {2}


def test_one_job_never_waits() -> None:
    ring = Ring(**RINGS["one machine"], jobs=1)  # type: ignore[arg-type]
    assert ring.run(10) == pytest.approx(1 / (3 * 0.018 + 3 * 0.0005), rel=0.05)
    assert ring.gathering.size == 1


def test_a_job_that_does_not_come_back_holds_the_others_up_for_a_few_trips_only() -> None:
    gathering = Gathering()
    gathering.groups = 1
    for job in (1, 2):
        gathering.came(job, 0.0)
    gathering.left([1, 2], 0, 0.0)
    gathering.groups = 1
    gathering.came(1, 1.0)
    assert gathering.patience(1.0, 1.0) == pytest.approx(1.0)
    assert gathering.patience(1.0, 1.5) == pytest.approx(0.5)
    assert gathering.patience(1.0, 2.0) == 0.0
    assert gathering.patience(4.5, 4.5) == 0.0  # it counts no more
    gathering.came(2, 5.0)
    assert gathering.patience(4.5, 5.0) == 0.0


def test_nobody_waits_for_a_job_that_ended() -> None:
    gathering = Gathering()
    for job in (1, 2, 3):
        gathering.came(job, 0.0)
    gathering.left([1, 2, 3], 0, 0.0)
    gathering.groups = 1
    gathering.came(1, 1.0)
    gathering.forget(2)
    assert gathering.patience(1.0, 1.0) == pytest.approx(1.0)
    gathering.forget(3)
    assert gathering.patience(1.0, 1.0) == 0.0
    assert gathering.size == 1


@given(st.lists(st.tuples(st.sampled_from(["came", "left", "forget"]), st.integers(0, 5), st.floats(0, 10))))
def test_whatever_happens_the_wait_is_bounded(events: list[tuple[str, int, float]]) -> None:
    gathering = Gathering()
    now = longest = 0.0
    for kind, job, pause in events:
        now += pause
        longest += pause
        if kind == "left":
            gathering.left([job], 0, now)
        else:
            getattr(gathering, kind)(job, *([now] if kind == "came" else []))
        assert 0.0 <= gathering.patience(now, now) <= longest
