"""Random interleavings of everything that moves money, in groups, with crashes before, in and after the commit.

After each step the database says what a model of a few dictionaries says, and adds up.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import Connection

from azu.ledger import Closed, Database, Earning, EndedJob, Payout, Refusal, Reserved, reading, verify
from azu.ledger.accounts import FEES, FREE, PLATFORM, chain, client, held, kind_of, paying, reserved, worker
from azu.ledger.decisions import OUTCOMES, Decide, Outcome, find_held
from azu.ledger.operations import Deposit, Release, Reserve, Settle
from azu.ledger.payouts import ConfirmPayouts, FailPayouts, PlanPayout, SendPayouts, SignPayouts
from azu.ledger.store import commit_group

WALLETS = st.sampled_from(["w1", "w2"])
PEERS = st.sampled_from(["p1", "p2", "p3"])
# So few that they come again: what was done before must not be done twice.
JOBS = st.integers(0, 9).map("job{}".format)
PAYOUTS = st.integers(0, 7).map("payout{}".format)
KEYS = st.sampled_from([None, "key1", "key2"])
LIMITS = {"key1": 300, "key2": None}
# Of which some add up to a key's limit, some to one more, and some are past 64 bits.
AMOUNTS = st.sampled_from([1, 60, 100, 101, 200, 2**90])
STATES: st.SearchStrategy[Literal["credited", "held"]] = st.sampled_from(["credited", "credited", "held"])
CRASHES = st.sampled_from(["", "", "", "before", "in", "after"])


class PowerLoss(Exception):
    """The process ends here."""


@cache
def empty_ledger() -> bytes:
    """A new ledger's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite3"
        with closing(Database(path)) as database:
            database.prepare("wei")
        return path.read_bytes()


@dataclass
class Model:
    """What has to come out: the same rules said again, without idempotency keys, rows or groups."""

    balances: Counter[str] = field(default_factory=Counter)
    claimed: set[str] = field(default_factory=set)
    open: dict[str, tuple[str, int, str | None]] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    over: set[str] = field(default_factory=set)
    spent: Counter[str] = field(default_factory=Counter)
    payouts: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    signed: dict[str, set[str]] = field(default_factory=dict)
    decided: set[str] = field(default_factory=set)

    def move(self, source: str, target: str, amount: int) -> None:
        self.balances[source] -= amount
        self.balances[target] += amount

    def apply(self, operation: Any) -> None:
        getattr(self, type(operation).__name__.lower())(operation)

    def deposit(self, o: Deposit) -> None:
        if o.txid not in self.claimed:
            self.claimed.add(o.txid)
            self.move(chain(o.provider), client(o.wallet), o.amount)

    def reserve(self, o: Reserve) -> None:
        limit = LIMITS.get(o.key_id or "")
        fits = limit is None or self.spent[o.key_id or ""] + o.amount <= limit
        if (
            o.job_id not in self.open.keys() | self.released | self.over
            and self.balances[client(o.wallet)] >= o.amount
            and fits
        ):
            self.move(client(o.wallet), reserved(o.wallet), o.amount)
            self.open[o.job_id] = (o.wallet, o.amount, o.key_id)
            if o.key_id:
                self.spent[o.key_id] += o.amount

    def settle(self, o: Settle) -> None:
        job = o.job
        if job.job_id in self.over or (job.job_id not in self.open.keys() | self.released and not o.is_free):
            return
        source = PLATFORM if job.job_id in self.released else FREE
        if job.job_id in self.open:
            wallet, amount, key_id = self.open[job.job_id]
            source = reserved(wallet)
            if key_id:
                self.spent[key_id] -= max(amount - job.cost, 0)
            self.move(source, client(wallet), max(amount - job.cost, 0))
            self.move(PLATFORM, source, max(job.cost - amount, 0))
        for earning in job.earnings:
            self.move(source, (worker if earning.state == "credited" else held)(earning.peer_id), earning.earned)
        self.move(source, PLATFORM, job.cost - sum(earning.earned for earning in job.earnings))
        self.open.pop(job.job_id, None)
        self.over.add(job.job_id)

    def release(self, o: Release) -> None:
        if o.job_id in self.open:
            wallet, amount, key_id = self.open.pop(o.job_id)
            self.move(reserved(wallet), client(wallet), amount)
            self.released.add(o.job_id)
            if key_id:
                self.spent[key_id] -= amount

    def decide(self, o: Decide) -> None:
        earning = o.earning
        if earning.key in self.decided:
            return
        self.decided.add(earning.key)
        if o.outcome == "worker":
            self.move(held(earning.peer_id), worker(earning.peer_id), earning.earned)
            return
        back = client(earning.wallet) if earning.wallet else FREE
        self.move(held(earning.peer_id), back, earning.earned)
        self.move(PLATFORM, back, earning.refund - earning.earned)
        if earning.key_id:
            self.spent[earning.key_id] -= earning.refund

    def planpayout(self, o: PlanPayout) -> None:
        if o.payout_id not in self.payouts and self.balances[worker(o.peer_id)] >= o.amount:
            self.move(worker(o.peer_id), paying(o.peer_id), o.amount)
            self.payouts[o.payout_id] = (o.peer_id, o.amount, "planned")

    def _step(self, o: Any, states: set[str], state: str) -> bool:
        if any(self.payouts.get(each, ("", 0, ""))[2] not in states for each in o.payout_ids):
            return False
        for each in o.payout_ids:
            peer_id, amount, _ = self.payouts[each]
            self.payouts[each] = (peer_id, amount, state)
        return True

    def signpayouts(self, o: SignPayouts) -> None:
        fresh = [each for each in o.payout_ids if o.txid not in self.signed.get(each, ())]
        before = dict(self.payouts)
        if self._step(o, {"planned", "signed", "sent"}, "signed"):
            self.payouts |= {each: before[each] for each in o.payout_ids if each not in fresh}
            for each in fresh:
                self.signed.setdefault(each, set()).add(o.txid)

    def sendpayouts(self, o: SendPayouts) -> None:
        self._step(o, {"signed", "sent"}, "sent")

    def confirmpayouts(self, o: ConfirmPayouts) -> None:
        was = dict(self.payouts)
        if all(o.txid in self.signed.get(each, ()) for each in o.payout_ids) and self._step(
            o, {"signed", "sent", "confirmed"}, "confirmed"
        ):
            share, rest = divmod(o.fee, len(o.payout_ids))
            for number, each in enumerate(o.payout_ids):
                if was[each][2] != "confirmed":
                    self.move(paying(was[each][0]), chain("c"), was[each][1])
                    self.move(FEES, chain("c"), share + (rest if number == 0 else 0))

    def failpayouts(self, o: FailPayouts) -> None:
        was = dict(self.payouts)
        if self._step(o, {"planned", "signed", "sent", "failed"}, "failed"):
            for each in o.payout_ids:
                if was[each][2] != "failed":
                    self.move(paying(was[each][0]), worker(was[each][0]), was[each][1])


@st.composite
def settlements(draw: st.DrawFn) -> Settle:
    cost = draw(AMOUNTS)
    left, earnings = cost * 8 // 10, []
    for number in range(draw(st.integers(0, 3))):
        earned = draw(st.integers(0, left))
        left -= earned
        earnings.append(Earning(draw(PEERS), number, number + 1, 7, 7, earned, draw(STATES)))
    job = EndedJob(draw(JOBS), 0, "m", 5, 3, 7 * len(earnings), cost, tuple(earnings))
    return Settle(job, is_free=draw(st.integers(0, 4)) == 4)


SOME_PAYOUTS = st.lists(PAYOUTS, min_size=1, max_size=2, unique=True).map(tuple)
TXIDS = st.integers(0, 3).map("tx{}".format)
OPERATIONS = st.one_of(
    st.builds(Deposit, st.just("c"), st.just("main"), st.integers(0, 9).map("d{}".format), WALLETS, AMOUNTS),
    st.builds(Reserve, JOBS, WALLETS, AMOUNTS, KEYS, st.just("me"), st.just(1)),
    settlements(),
    st.builds(Release, JOBS),
    st.builds(PlanPayout, PAYOUTS, PEERS, st.just("c"), st.just("a"), AMOUNTS),
    st.builds(SignPayouts, SOME_PAYOUTS, TXIDS, st.just(b"raw"), st.none()),
    st.builds(SendPayouts, SOME_PAYOUTS),
    st.builds(ConfirmPayouts, SOME_PAYOUTS, TXIDS, st.integers(0, 5)),
    st.builds(FailPayouts, SOME_PAYOUTS, st.just("lost")),
)


class LedgerMachine(RuleBasedStateMachine):
    """The ledger in SQLite beside its model."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "ledger.sqlite3").write_bytes(empty_ledger())
        self.model = Model()
        self.last: list[Any] = []
        self.now = 1_000_000
        self.open()
        self.several_at_once([Deposit("c", "main", f"at-first-{wallet}", wallet, 2**91) for wallet in ("w1", "w2")], "")

    def open(self) -> None:
        self.database = Database(self.folder / "ledger.sqlite3")
        self.database.prepare("wei")

    def crash(self) -> None:
        self.database.close()
        self.open()

    def commit(self, operations: list[Any], crash: str = "") -> list[Any]:
        """Have them written; a crash loses the answers, and what was not committed."""

        def work(connection: Connection) -> list[Any]:
            outcomes = commit_group(connection, operations, self.now, lambda _, key_ids: LIMITS)
            if crash == "in":
                raise PowerLoss
            return outcomes

        self.now += 1
        answers: list[Any] = []
        if crash != "before":
            with suppress(PowerLoss):
                answers = self.database.write(work)
        if crash:
            self.crash()
            return []
        return [outcome.unwrap() for outcome in answers]

    @rule(operations=st.lists(OPERATIONS, min_size=1, max_size=8), crash=CRASHES)
    def several_at_once(self, operations: list[Any], crash: str) -> None:
        answers = self.commit(operations, crash)
        if crash not in ("before", "in"):
            for operation in operations:
                self.model.apply(operation)
        self.last = operations
        for operation, answer in zip(operations, answers, strict=False):
            self.check_answer(operation, answer)

    @precondition(lambda self: any(kind_of(account) == "held" for account in self.model.balances))
    @rule(data=st.data(), outcome=st.sampled_from(sorted(OUTCOMES)), crash=CRASHES)
    def the_operator_decides(self, data: st.DataObject, outcome: Outcome, crash: str) -> None:
        found = self.database.read(find_held)
        if found:
            self.several_at_once([Decide(data.draw(st.sampled_from(found)), outcome)], crash)

    @precondition(lambda self: self.last)
    @rule()
    def whoever_got_no_answer_asks_again(self) -> None:
        self.commit(self.last)
        for operation in self.last:
            self.model.apply(operation)

    def check_answer(self, operation: Any, answer: Any) -> None:
        if isinstance(operation, Release | Settle) and not isinstance(answer, Refusal):
            assert isinstance(answer, Closed)
        if isinstance(operation, Reserve) and not isinstance(answer, Refusal):
            assert isinstance(answer, Reserved)
        if isinstance(operation, PlanPayout) and not isinstance(answer, Refusal):
            assert isinstance(answer, Payout)

    @invariant()
    def it_adds_up(self) -> None:
        if not hasattr(self, "database"):
            return
        with self.database.reading() as connection:
            assert verify(connection) == []
            kinds = {kind_of(account) for account in self.model.balances} | {"client", "worker"}
            found = {
                f"{kind}:{name}" if name else kind: amount
                for kind in kinds
                for name, amount in reading.balances(connection, kind).items()
            }
            assert found == {account: amount for account, amount in self.model.balances.items() if amount}
            for key_id in LIMITS:
                assert reading.spent(connection, key_id) == self.model.spent[key_id]
            states = {payout.payout_id: payout.state for payout in reading.payouts(connection)}
            assert states == {payout_id: state for payout_id, (_, _, state) in self.model.payouts.items()}
            open_jobs = {reservation.job_id for reservation in reading.open_reservations(connection)}
            assert open_jobs == self.model.open.keys()
        assert sum(self.model.balances.values()) == 0

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
            shutil.rmtree(self.folder)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink what is found takes minutes
)


def test_the_model_can_be_wrong() -> None:
    """That the machine compares anything: a model with other numbers is found out."""
    machine = LedgerMachine()
    machine.begin()
    try:
        machine.several_at_once([Deposit("c", "main", "d", "w1", 5)], "")
        machine.it_adds_up()
        machine.model.balances["client:w1"] += 1
        with pytest.raises(AssertionError):
            machine.it_adds_up()
    finally:
        machine.teardown()
