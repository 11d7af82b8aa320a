"""Whom a disagreement is held against: both at first, and who disagrees with everybody in the end."""

from __future__ import annotations

from coordinator.disputes import Disputes, pairs_of, partners
from coordinator.generation import JobReport, StageReport

US = "coordinator"


def report(*stages: tuple[str, tuple[str, ...]]) -> JobReport:
    """A job with such stages, each held where somebody's word is against it."""
    told = tuple(
        StageReport(peer, 0, 1, 1, 1, 1, "held" if against else "credited", "contradicted" if against else "", against)
        for peer, against in stages
    )
    return JobReport("00", 1, 1, 1, 1, told)


def dispute(one: str, other: str) -> JobReport:
    return report((one, (other,)), (other, (one,)), ("bystander", ()))


def verdicts(disputes: Disputes, subject: JobReport, now: float = 0.0) -> dict[str, int]:
    return {peer_id: weight for peer_id, weight, _ in disputes.judge(subject, now)}


def test_a_job_in_which_all_agree_is_nobodys_fault() -> None:
    assert verdicts(Disputes(US), report(("a", ()), ("b", ()))) == {}


def test_two_that_disagree_are_one_pair() -> None:
    assert pairs_of(dispute("b", "a")) == (("a", "b"),)
    assert partners([("a", "b"), ("a", "c")]) == {"a": {"b", "c"}, "b": {"a"}, "c": {"a"}}


def test_both_are_suspects() -> None:
    assert verdicts(Disputes(US), dispute("a", "b")) == {"a": 1, "b": 1}


def test_who_disagrees_with_everybody_is_at_fault_alone() -> None:
    disputes = Disputes(US)
    assert verdicts(disputes, dispute("liar", "a")) == {"liar": 1, "a": 1}
    assert verdicts(disputes, dispute("liar", "a")) == {"liar": 1, "a": 1}  # the same two, whoever of them lies
    assert verdicts(disputes, dispute("b", "liar")) == {"liar": 1, "b": 1}
    assert verdicts(disputes, dispute("liar", "c")) == {"liar": 2}


def test_what_is_long_ago_counts_no_more() -> None:
    disputes = Disputes(US)
    for number, other in enumerate("abc"):
        assert verdicts(disputes, dispute("liar", other), now=4_000.0 * number) == {"liar": 1, other: 1}


def test_our_own_word_is_not_in_doubt() -> None:
    assert verdicts(Disputes(US), report(("a", ()), ("b", (US,)))) == {"b": 2}
