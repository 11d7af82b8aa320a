"""What becomes of earnings that are held: their operator decides, once.

    for the worker   held:<peer id> -> worker:<peer id>
    for the client   held:<peer id> and the platform's share -> client:<wallet>, or free where the job was

The transaction's key is the stage's, its kind the outcome. A client gets no more back than it was charged: where the
platform bore a part of the job, that part stays with it. What it gets back, its API key has not spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, Text, cast, literal, select
from sqlalchemy.sql.elements import ColumnElement

from azu.ledger import schema
from azu.ledger.accounts import FREE, PLATFORM, client, held, worker
from azu.ledger.answers import Refusal
from azu.ledger.page import Page, Touched, Wanted

__all__ = ["OUTCOMES", "Decide", "HeldEarning", "Outcome", "find_held"]

Outcome = Literal["worker", "client"]
# Kinds of transactions.
OUTCOMES: dict[Outcome, str] = {"worker": "held-paid", "client": "held-refunded"}
_DECIDED: dict[str, Outcome] = {kind: outcome for outcome, kind in OUTCOMES.items()}


@dataclass(frozen=True, slots=True)
class HeldEarning:
    """Earnings of one stage that are, or were, held; never changed but for the outcome.

    refund: what the client gets back if it is decided so. wallet, key_id: who paid; "" and None where the job was free.
    outcome: None while nobody has decided.
    """

    job_id: str
    epoch: int
    stage: int
    peer_id: str
    start: int
    end: int
    tokens: int
    earned: int
    reason: str
    receipt: bytes | None
    settled_at: int
    wallet: str
    key_id: str | None
    refund: int
    outcome: Outcome | None

    @property
    def key(self) -> str:
        """That of the transaction which decides."""
        return f"held:{self.job_id}:{self.epoch}:{self.stage}"

    def moves(self, outcome: Outcome) -> tuple[tuple[str, int], ...]:
        """What an outcome does."""
        out = (held(self.peer_id), -self.earned)
        if outcome == "worker":
            return out, (worker(self.peer_id), self.earned)
        back = client(self.wallet) if self.wallet else FREE
        return out, (PLATFORM, self.earned - self.refund), (back, self.refund)


@dataclass(frozen=True, slots=True)
class Decide:
    """Decide what becomes of held earnings."""

    earning: HeldEarning
    outcome: Outcome

    def wanted(self) -> Wanted:
        return Wanted(transactions=(self.earning.key,))

    def touched(self, page: Page) -> Touched:
        accounts = tuple(account for account, _ in self.earning.moves(self.outcome))
        return Touched(accounts, () if self.earning.key_id is None else (self.earning.key_id,))

    def decide(self, page: Page) -> Outcome | Refusal:
        if self.earning.key in page.known:
            return Refusal("decided_before", "it was decided before, and a decision is final")
        page.post(self.earning.key, OUTCOMES[self.outcome], self.earning.moves(self.outcome))
        if self.outcome == "client" and (key_id := self.earning.key_id) is not None:
            page.spending.put(key_id, page.spent(key_id) - self.earning.refund)
        return self.outcome


def find_held(
    connection: Connection,
    *,
    peer_id: str | None = None,
    job_id: str | None = None,
    is_undecided: bool = False,
    limit: int | None = 1_000,
) -> Sequence[HeldEarning]:
    """Held earnings, the latest first: all, one worker's, one job's, or those that nobody has decided on."""
    stages, jobs, reservations, decided = schema.stages, schema.jobs, schema.reservations, schema.transactions
    query = (
        select(
            stages,
            jobs.c.settled_at,
            jobs.c.wallet,
            jobs.c.key_id,
            jobs.c.cost,
            jobs.c.token_layers.label("all_layers"),
            reservations.c.captured,
            decided.c.kind,
        )
        .join(jobs, (stages.c.job_id == jobs.c.job_id) & (stages.c.epoch == jobs.c.epoch))
        .outerjoin(reservations, reservations.c.job_id == stages.c.job_id)
        .outerjoin(decided, decided.c.key == _key_of(stages.c.job_id, stages.c.epoch, stages.c.stage))
        .where(stages.c.state == "held", stages.c.earned != 0)
        .order_by(jobs.c.seq.desc(), stages.c.stage)
        .limit(limit)
    )
    if peer_id is not None:
        query = query.where(stages.c.peer_id == peer_id)
    if job_id is not None:
        query = query.where(stages.c.job_id == job_id)
    if is_undecided:
        query = query.where(decided.c.kind.is_(None))
    return [_held_of(row._mapping) for row in connection.execute(query)]


def _key_of(*parts: ColumnElement[object]) -> ColumnElement[str]:
    key: ColumnElement[str] = literal("held")
    for part in parts:
        key = key.concat(":").concat(cast(part, Text))
    return key


def _held_of(row: Mapping[str, Any] | RowMapping) -> HeldEarning:
    is_reserved = row["captured"] is not None
    share = row["cost"] // row["all_layers"] * row["token_layers"] if row["all_layers"] else 0
    charged = row["captured"] if is_reserved else row["cost"]
    return HeldEarning(
        **{name: row[name] for name in ("job_id", "epoch", "stage", "peer_id", "tokens", "earned", "reason")},
        start=row["first_layer"],
        end=row["end_layer"],
        receipt=row["receipt"],
        settled_at=row["settled_at"],
        wallet=row["wallet"] if is_reserved else "",
        key_id=row["key_id"] if is_reserved else None,
        refund=share * charged // row["cost"] if row["cost"] else 0,
        outcome=_DECIDED.get(row["kind"] or ""),
    )
