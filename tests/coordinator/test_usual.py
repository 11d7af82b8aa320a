"""What is usual with a worker: the median of what it was over minutes, from before any job."""

from __future__ import annotations

import pytest

from azu.records import Speed, WorkerRecord
from coordinator.usual import Usual
from tests.worker_records import OURS, worker


def record(base_ns: int = 1_000_000, token_ns: int = 100_000, end: int = 6) -> WorkerRecord:
    speed = Speed(decode_base_ns=base_ns, decode_token_ns=token_ns)
    return worker(1, (OURS, 0, end, "loaded"), speed=speed)


def noted(*polls: tuple[float, WorkerRecord, float]) -> Usual:
    usual = Usual()
    for now, each, answer_s in polls:
        usual.note(each, answer_s, now)
    return usual


def test_three_records_tell_what_is_usual() -> None:
    polls = [(float(now), record(), 0.002) for now in range(3)]
    assert noted(*polls[:2]).step_s(10, 1) == 0.0
    assert noted(*polls[:2]).usual_answer_s == 0.0
    usual = noted(*polls)
    assert usual.step_s(10, 1) == pytest.approx(0.011)
    assert usual.step_s(10, 16) == pytest.approx(0.026)
    assert usual.answer_s == usual.usual_answer_s == 0.002


def test_who_has_become_slow_is_not_as_usual_for_minutes() -> None:
    usual = noted(*((float(now), record(), 0.002) for now in range(600)))
    for now in range(600, 780):
        usual.note(record(20_000_000, 2_000_000), 0.1, float(now))
        assert usual.step_s(10, 1) == pytest.approx(0.011)
        assert usual.usual_answer_s == 0.002
    assert usual.answer_s == 0.1
    for now in range(780, 1_200):
        usual.note(record(20_000_000, 2_000_000), 0.1, float(now))
    assert usual.step_s(10, 1) == pytest.approx(0.22)
    assert usual.usual_answer_s == 0.1


def test_one_late_answer_is_none() -> None:
    usual = noted(*((float(now), record(), 0.002) for now in range(10)), (10.0, record(), 4.0))
    assert usual.answer_s == 0.002


def test_other_layers_have_another_pace() -> None:
    usual = noted(*((float(now), record(), 0.002) for now in range(10)))
    usual.note(record(end=3), 0.002, 10.0)
    assert usual.step_s(3, 1) == 0.0
    assert usual.usual_answer_s == 0.002


def test_what_was_not_measured_is_not_usual() -> None:
    assert noted(*((float(now), record(0, 0), 0.002) for now in range(10))).step_s(10, 1) == 0.0
