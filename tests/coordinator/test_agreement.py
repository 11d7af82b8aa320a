"""Nobody is credited on its own word alone, and what is credited, held and kept adds up, whoever lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.crossings import Crossing, token_crossing
from azu.identity import Identity
from azu.tickets import JobTicket, Receipt, sign_receipt
from coordinator.agreement import compare, word_of
from coordinator.generation import JobReport
from coordinator.meter import read_job

PEERS = [Identity(bytes([number]) * 32) for number in range(1, 6)]
COORDINATOR = Identity(bytes([99]) * 32).peer_id

# What a stage does: as it should, gives no receipt, confirms one position too few, or says that something else was
# received, or sent.
Conduct = Literal["honest", "silent", "short", "received", "sent"]
CONDUCTS: tuple[Conduct, ...] = ("honest", "silent", "short", "received", "sent")
LIE = Crossing(start=0, end=1, digest="e" * 64)


@dataclass(frozen=True)
class Job:
    ticket: JobTicket
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    receipts: dict[int, Receipt]

    def read(self) -> JobReport:
        signed = {index: (sign_receipt(PEERS[index], each), each) for index, each in self.receipts.items()}
        return read_job(self.ticket, self.prompt, self.tokens, signed)

    def reasons(self) -> list[str | None]:
        said = {index: word_of(receipt) for index, receipt in self.receipts.items()}
        return [each.reason for each in compare(self.ticket, self.prompt, self.tokens, said)]


def job_of(conducts: list[Conduct], prompt: int = 3, count: int = 4, price: int = 2) -> Job:
    """A job with one layer for each stage, which act like that."""
    stages = [{"peer_id": PEERS[n].peer_id, "start": n, "end": n + 1} for n in range(len(conducts))]
    ticket = JobTicket.model_validate(
        {
            "job_id": b"j" * 16, "epoch": 0, "manifest": "c" * 64, "n_layers": len(conducts), "stages": stages,
            "dtype": "float32", "prompt_tokens": prompt, "max_tokens": 100, "stop_tokens": (), "sampling": {},
            "price": price, "begun_at": 0, "issued_at": 0, "expires_at": 1, "coordinator": COORDINATOR,
        }
    )  # fmt: skip
    ids, tokens = tuple(range(prompt)), tuple(range(50, 50 + count))
    receipts = {
        index: _receipt(ticket, index, conduct, ids, tokens)
        for index, conduct in enumerate(conducts)
        if conduct != "silent"
    }
    return Job(ticket, ids, tokens, receipts)


def _receipt(
    ticket: JobTicket, index: int, conduct: Conduct, prompt: tuple[int, ...], tokens: tuple[int, ...]
) -> Receipt:
    entry, positions, last = ticket.stages[index], ticket.positions(len(tokens)), len(ticket.stages) - 1
    seams = [Crossing(start=0, end=positions, digest=f"{number:064x}") for number in range(last + 2)]
    seams[0] = token_crossing(0, (*prompt, *tokens)[:positions])
    seams[-1] = token_crossing(len(prompt), tokens)
    return Receipt(
        job_id=ticket.job_id, epoch=0, stage=index, peer_id=entry.peer_id, start=entry.start, end=entry.end,
        tokens=positions - 1 if conduct == "short" else positions,
        received=LIE if conduct == "received" else seams[index],
        sent=LIE if conduct == "sent" else seams[index + 1],
        issued_at=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("conducts", "reasons"),
    [
        (["honest"], [None]),
        (["honest", "honest", "honest"], [None, None, None]),
        (["received"], ["contradicted"]),
        (["sent"], ["contradicted"]),
        # Nobody can tell which of two neighbours lies.
        (["honest", "received", "honest"], ["contradicted", "contradicted", None]),
        (["honest", "sent", "honest"], [None, "contradicted", "contradicted"]),
        # The first stage's neighbour before it is the last one.
        (["received", "honest", "honest"], ["contradicted", None, "contradicted"]),
        # What the last one sent has the coordinator seen itself.
        (["honest", "honest", "sent"], [None, None, "contradicted"]),
        # A stage that is silent, or confirms too little, costs nobody else anything.
        (["honest", "silent", "honest"], [None, "no_receipt", None]),
        (["honest", "short", "honest"], [None, "short", None]),
        (["silent", "honest", "honest"], ["no_receipt", None, None]),
        (["honest", "silent", "honest", "honest"], [None, "no_receipt", None, None]),
        # Unless it was the last one to have a word.
        (["honest", "silent", "honest", "silent"], [None, "no_receipt", "unwitnessed", "no_receipt"]),
        (["silent", "silent"], ["no_receipt", "no_receipt"]),
    ],
)
def test_who_is_held_and_why(conducts: list[Conduct], reasons: list[str | None]) -> None:
    assert job_of(conducts).reasons() == reasons


def test_whose_word_is_against_it_is_named() -> None:
    report = job_of(["honest", "sent", "honest"]).read()
    assert [stage.against for stage in report.stages] == [(), (PEERS[2].peer_id,), (PEERS[1].peer_id,)]
    assert job_of(["honest", "sent"]).read().stages[1].against == (COORDINATOR,)
    assert job_of(["received"]).read().stages[0].against == (COORDINATOR,)


def test_two_that_tell_the_same_lie_agree_but_cannot_raise_the_count() -> None:
    """What passed between them is theirs to say; how much is paid for is not."""
    honest, job = job_of(["honest"] * 4), job_of(["honest", "sent", "received", "honest"])
    assert job.reasons() == [None] * 4
    assert job.read().credited == honest.read().credited


conducts = st.lists(st.sampled_from(CONDUCTS), min_size=1, max_size=5)


@given(conducts, st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**62))
def test_every_unit_is_credited_held_or_kept(conducts: list[Conduct], prompt: int, count: int, price: int) -> None:
    report = job_of(conducts, prompt, count, price).read()
    assert report.credited + report.held + report.platform == report.cost
    assert min(report.credited, report.held, report.platform) >= 0
    assert report.platform == sum(each.token_layers * price - each.earned for each in report.stages)


@given(conducts, st.integers(1, 20), st.integers(1, 20))
def test_nobody_is_credited_without_two_that_agree_or_against_anybodys_word(
    conducts: list[Conduct], prompt: int, count: int
) -> None:
    job = job_of(conducts, prompt, count)
    positions, last = prompt + count - 1, len(conducts) - 1
    words = {index: each for index, each in job.receipts.items() if each.tokens >= positions}
    given, came = token_crossing(0, [*job.prompt, *job.tokens][:positions]), token_crossing(prompt, job.tokens)
    for index, stage in enumerate(job.read().stages):
        if stage.state == "held":
            continue
        before = given if not index else words[index - 1].sent if index - 1 in words else None
        after = came if index == last else words[index + 1].received if index + 1 in words else None
        mine = words[index]
        assert mine.received == before or mine.sent == after
        assert before in (None, mine.received)
        assert after in (None, mine.sent)


@given(conducts)
def test_a_liar_harms_its_neighbours_in_the_ring_at_most(conducts: list[Conduct]) -> None:
    for index, reason in enumerate(job_of(conducts).reasons()):
        around = {conducts[index - 1], conducts[(index + 1) % len(conducts)]}
        if conducts[index] == "honest" and around == {"honest"}:
            assert reason is None
