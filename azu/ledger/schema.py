"""The ledger's tables. `migrations/` makes them, with triggers that keep what is written as it was.

head ── the last transaction's number and digest, and the currency; locking its one row is what writers wait for
transactions ─┬─ postings             append-only; each digest covers the one before
              ├─ deposits             append-only
              ├─ jobs ── stages       append-only
              ├─ reservations         open -> settled | released, once
              └─ payouts ── payout_transactions (append-only)
balances      what the postings add up to, by account
key_spending  what the reservations add up to, by API key, less what was given back
api_keys      who may spend; challenges that were redeemed for one; sign_in, the secret that they are made with
submitted     jobs that nobody waits for on the line, and what came of them, for an hour
kept ── kept_jobs   requests that outlive their coordinator's process, while they run
coordinators  who shares the ledger, and is alive
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "METADATA",
    "Amount",
    "api_keys",
    "balances",
    "challenges",
    "coordinators",
    "deposits",
    "head",
    "jobs",
    "kept",
    "kept_jobs",
    "key_spending",
    "payout_transactions",
    "payouts",
    "postings",
    "reservations",
    "sign_in",
    "stages",
    "submitted",
    "transactions",
]


class Amount(TypeDecorator[int]):
    """An int of up to 39 digits: NUMERIC(39, 0) in PostgreSQL, decimal text in SQLite, whose integers have 64 bits."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind: TypeEngine[Any] = Numeric(39, 0) if dialect.name == "postgresql" else Text()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: int | None, dialect: Dialect) -> Decimal | str | None:
        if value is None:
            return None
        return Decimal(value) if dialect.name == "postgresql" else str(value)

    def process_result_value(self, value: object, dialect: Dialect) -> int | None:
        return None if value is None else int(str(value))


METADATA = MetaData()

head = Table(
    "head",
    METADATA,
    Column("id", BigInteger, CheckConstraint("id = 1", name="one_head"), primary_key=True, autoincrement=False),
    Column("seq", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("currency", String(32), nullable=False),
)

transactions = Table(
    "transactions",
    METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, nullable=False, unique=True),
    Column("kind", String(32), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
)

postings = Table(
    "postings",
    METADATA,
    Column("seq", BigInteger, ForeignKey("transactions.seq"), primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("account", Text, nullable=False),
    Column("amount", Amount, nullable=False),
    Index("postings_by_account", "account", "seq"),
)

balances = Table(
    "balances",
    METADATA,
    Column("account", Text, primary_key=True),
    Column("kind", String(32), nullable=False, index=True),
    Column("balance", Amount, nullable=False),
)

reservations = Table(
    "reservations",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("wallet", Text, nullable=False),
    Column("key_id", Text),
    Column("amount", Amount, nullable=False),
    Column("owner", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("captured", Amount, nullable=False),
    CheckConstraint("state IN ('open', 'settled', 'released')", name="reservation_state"),
    Index("reservations_by_state", "state", "owner"),
)

key_spending = Table(
    "key_spending",
    METADATA,
    Column("key_id", Text, primary_key=True),
    Column("spent", Amount, nullable=False),  # captured and not given back, and reserved for running jobs
)

deposits = Table(
    "deposits",
    METADATA,
    Column("chain", Text, primary_key=True),
    Column("txid", Text, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("wallet", Text, nullable=False, index=True),
    Column("amount", Amount, nullable=False),
    Column("seq", BigInteger, ForeignKey("transactions.seq"), nullable=False),
)

jobs = Table(
    "jobs",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("wallet", Text, nullable=False),
    Column("key_id", Text),
    Column("manifest", Text, nullable=False),
    Column("settled_at", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("token_layers", BigInteger, nullable=False),
    Column("cost", Amount, nullable=False),
    Column("seq", BigInteger, ForeignKey("transactions.seq"), nullable=False),
    Index("jobs_by_wallet", "wallet", "settled_at"),
)

stages = Table(
    "stages",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("stage", BigInteger, primary_key=True, autoincrement=False),
    Column("peer_id", Text, nullable=False, index=True),
    Column("first_layer", BigInteger, nullable=False),
    Column("end_layer", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("token_layers", BigInteger, nullable=False),
    Column("earned", Amount, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("receipt", LargeBinary),
    ForeignKeyConstraint(["job_id", "epoch"], ["jobs.job_id", "jobs.epoch"]),
    CheckConstraint("state IN ('credited', 'held')", name="stage_state"),
)

payouts = Table(
    "payouts",
    METADATA,
    Column("payout_id", Text, primary_key=True),
    Column("peer_id", Text, nullable=False, index=True),
    Column("provider", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("amount", Amount, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("planned_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("txid", Text, nullable=False),
    Column("fee", Amount, nullable=False),
    Column("reason", Text, nullable=False),
    CheckConstraint("state IN ('planned', 'signed', 'sent', 'confirmed', 'failed')", name="payout_state"),
)

payout_transactions = Table(
    "payout_transactions",
    METADATA,
    Column("payout_id", Text, ForeignKey("payouts.payout_id"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("txid", Text, nullable=False, index=True),
    Column("raw", LargeBinary, nullable=False),
    Column("nonce", BigInteger),
    Column("signed_at", BigInteger, nullable=False),
    UniqueConstraint("payout_id", "txid", name="payout_signed_once"),
)

api_keys = Table(
    "api_keys",
    METADATA,
    Column("key_id", Text, primary_key=True),
    Column("digest", LargeBinary, nullable=False),  # of the secret, which is kept nowhere
    Column("wallet", Text, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("scopes", Text, nullable=False),  # with blanks between
    Column("spending_limit", Amount),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False, index=True),
    Column("revoked_at", BigInteger),
)

challenges = Table(
    "challenges",
    METADATA,
    Column("nonce", Text, primary_key=True),
    Column("key_id", Text, nullable=False),  # that it was redeemed for
    Column("expires_at", BigInteger, nullable=False, index=True),
)

sign_in = Table(
    "sign_in",
    METADATA,
    Column("id", BigInteger, CheckConstraint("id = 1", name="one_secret"), primary_key=True, autoincrement=False),
    Column("secret", LargeBinary, nullable=False),  # what challenges are made with
)

submitted = Table(
    "submitted",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("account", Text, nullable=False, index=True),
    Column("owner", Text, nullable=False),
    Column("model_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("came_ns", BigInteger, nullable=False),  # which is older
    Column("ended_at", BigInteger, index=True),
    Column("outcome", Text, nullable=False),  # JSON
    Column("chars", BigInteger, nullable=False),  # of the outcome
    Column("idempotency", Text, nullable=False, index=True),  # digest of the client's key, or empty
    Column("asked", Text, nullable=False),  # digest of what was asked with that key
)

kept = Table(
    "kept",
    METADATA,
    Column("request_id", Text, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("leader", Text, index=True),  # the coordinator that has its jobs run; null while none has
    Column("term", BigInteger, nullable=False),  # grows with each that takes it over
    Column("manifest", Text, nullable=False),
    Column("wallet", Text, nullable=False),
    Column("asked", LargeBinary, nullable=False),  # CBOR, see coordinator/journal.py
)

coordinators = Table(
    "coordinators",
    METADATA,
    Column("peer_id", Text, primary_key=True),
    Column("beat", BigInteger, nullable=False),  # grows while it lives
    Column("url", Text, nullable=False),
)

kept_jobs = Table(
    "kept_jobs",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("request_id", Text, ForeignKey("kept.request_id"), nullable=False, index=True),
    Column("number", BigInteger, nullable=False),
    Column("standing", LargeBinary, nullable=False),  # CBOR
)
