"""The part of the ledger that a group of operations needs, in memory: they are decided here, one after the other. Pure.

`azu.ledger.store` fills a page inside a database transaction and writes back what is new and changed on it. A decision
either changes nothing, or posts first (which checks balances) and notes the rest afterwards: none is left half done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from azu.errors import InternalError
from azu.ledger.accounts import MAX_AMOUNT, may_be_negative
from azu.ledger.answers import Closed, Deposited, KeyLimit, Payout, Reserved
from azu.ledger.digests import digest_of

__all__ = ["Cells", "Operation", "Page", "Row", "Touched", "Wanted", "row_of"]

K = TypeVar("K")
V = TypeVar("V")
T_co = TypeVar("T_co", covariant=True)

Row = dict[str, Any]  # one of the schema's, by column


def row_of(value: Any) -> Row:
    """The fields of a dataclass with slots. dataclasses.asdict copies deeply, and took a third of a job's time."""
    return {name: getattr(value, name) for name in value.__slots__}


class Cells(Generic[K, V]):
    """Values by key, of which it is known what the database holds."""

    def __init__(self, stored: Mapping[K, V]) -> None:
        self._stored = stored.keys()
        self._values = dict(stored)
        self._touched: dict[K, None] = {}  # a set that keeps its order

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._touched[key] = None

    def added(self) -> Iterator[tuple[K, V]]:
        """What the database does not have."""
        return ((key, self._values[key]) for key in self._touched if key not in self._stored)

    def changed(self) -> Iterator[tuple[K, V]]:
        """What the database has otherwise."""
        return ((key, self._values[key]) for key in self._touched if key in self._stored)


class Wanted(NamedTuple):
    """What an operation has to know, by its ids."""

    jobs: tuple[str, ...] = ()
    deposits: tuple[tuple[str, str], ...] = ()  # chain, txid
    payouts: tuple[str, ...] = ()
    transactions: tuple[str, ...] = ()  # keys
    led: tuple[str, ...] = ()  # jobs whose leaders count


class Touched(NamedTuple):
    """Accounts and API keys whose sums an operation reads or changes."""

    accounts: tuple[str, ...] = ()
    key_ids: tuple[str, ...] = ()


class Operation(Protocol[T_co]):
    """One change of the ledger, which may be asked for again and then gives the first answer."""

    def wanted(self) -> Wanted: ...

    def touched(self, page: Page) -> Touched:
        """Asked once the page holds what is wanted."""

    def decide(self, page: Page) -> T_co: ...


@dataclass
class Page:
    """See the module. `now` is in unix seconds."""

    now: int
    seq: int
    digest: bytes
    reservations: Cells[str, Reserved]
    settled: dict[str, Closed]  # jobs, by id
    deposits: Cells[tuple[str, str], Deposited]
    payouts: Cells[str, Payout]
    signings: dict[str, list[str]]  # transaction ids of each payout
    known: set[str]  # keys of transactions
    leaders: Mapping[str, str | None] = field(default_factory=dict)  # of jobs that outlive their coordinator, by id
    balances: Cells[str, int] = field(default_factory=lambda: Cells({}))
    spending: Cells[str, int] = field(default_factory=lambda: Cells({}))
    limits: Mapping[str, KeyLimit] = field(default_factory=dict)
    new: dict[str, list[Row]] = field(default_factory=dict)  # rows of the tables of these names

    def balance(self, account: str) -> int:
        """What the account has."""
        return self.balances.get(account) or 0

    def spent(self, key_id: str) -> int:
        """What was captured and is reserved through an API key."""
        return self.spending.get(key_id) or 0

    def add(self, table: str, row: Row) -> None:
        """Note a row to be inserted."""
        self.new.setdefault(table, []).append(row)

    def closed(self, job_id: str) -> Closed | None:
        """How the job ended, if it has."""
        reservation = self.reservations.get(job_id)
        if reservation is not None and reservation.state != "open":
            return Closed(job_id, reservation.captured, reservation.amount - reservation.captured)
        return self.settled.get(job_id)

    def post(self, key: str, kind: str, moves: Iterable[tuple[str, int]], *, at: int | None = None) -> int:
        """Move amounts between accounts, and return the transaction's number.

        Raises:
            InternalError: they do not add up to zero, or an account would fall below zero.
        """
        sums: dict[str, int] = {}
        for account, amount in moves:
            sums[account] = sums.get(account, 0) + amount
        postings = [(account, amount) for account, amount in sums.items() if amount]
        after = {account: self.balance(account) + amount for account, amount in postings}
        if key in self.known or sum(sums.values()) != 0 or not all(_is_possible(*each) for each in after.items()):
            raise InternalError(f"the ledger refuses the transaction {key}: {postings}", code="ledger_unbalanced")
        self.known.add(key)
        for account, balance in after.items():
            self.balances.put(account, balance)
        self._write(key, kind, self.now if at is None else at, postings)
        return self.seq

    def _write(self, key: str, kind: str, at: int, postings: list[tuple[str, int]]) -> None:
        self.seq += 1
        self.digest = digest_of(self.digest, self.seq, key, kind, at, postings)
        self.add("transactions", {"seq": self.seq, "key": key, "kind": kind, "at": at, "digest": self.digest})
        for number, (account, amount) in enumerate(postings):
            self.add("postings", {"seq": self.seq, "number": number, "account": account, "amount": amount})


def _is_possible(account: str, balance: int) -> bool:
    return abs(balance) < MAX_AMOUNT and (balance >= 0 or may_be_negative(account))
