"""The ledger as it began: tables, and triggers that keep what is written as it was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from azu.ledger.migrations.triggers import forbid_changes, forbid_deletes
from azu.ledger.schema import Amount

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NEVER_BELOW_ZERO = "kind IN ('chain', 'platform', 'fees', 'free') OR "
_NOT_NEGATIVE = {"postgresql": "balance >= 0", "sqlite": "balance NOT LIKE '-%'"}


def upgrade() -> None:
    _make_core()
    _make_jobs()
    _make_payouts()
    for table in ("transactions", "postings", "deposits", "jobs", "stages", "payout_transactions"):
        forbid_changes(table)
    for table in ("head", "balances", "reservations", "payouts"):
        forbid_deletes(table)
    forbid_changes("head", unless="NEW.seq >= OLD.seq AND NEW.currency = OLD.currency")
    same = " AND ".join(f"NEW.{name} = OLD.{name}" for name in ("job_id", "wallet", "amount", "owner"))
    forbid_changes("reservations", unless=f"OLD.state = 'open' AND {same}")
    same = " AND ".join(
        f"NEW.{name} = OLD.{name}" for name in ("payout_id", "peer_id", "provider", "address", "amount")
    )
    forbid_changes("payouts", unless=f"OLD.state IN ('planned', 'signed', 'sent') AND {same}")


def _make_core() -> None:
    op.create_table(
        "head",
        sa.Column("id", sa.BigInteger, sa.CheckConstraint("id = 1", name="one_head"), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("currency", sa.String(32), nullable=False),
    )
    op.create_table(
        "transactions",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "postings",
        sa.Column("seq", sa.BigInteger, sa.ForeignKey("transactions.seq"), primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("amount", Amount, nullable=False),
    )
    op.create_index("postings_by_account", "postings", ["account", "seq"])
    not_negative = _NEVER_BELOW_ZERO + _NOT_NEGATIVE[op.get_bind().dialect.name]
    op.create_table(
        "balances",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False, index=True),
        sa.Column("balance", Amount, nullable=False),
        sa.CheckConstraint(not_negative, name="balance_covered"),
    )


def _make_jobs() -> None:
    op.create_table(
        "reservations",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("wallet", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("amount", Amount, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("captured", Amount, nullable=False),
        sa.CheckConstraint("state IN ('open', 'settled', 'released')", name="reservation_state"),
    )
    op.create_index("reservations_by_state", "reservations", ["state", "owner"])
    op.create_table(
        "key_spending",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("spent", Amount, nullable=False),
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("wallet", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("settled_at", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("token_layers", sa.BigInteger, nullable=False),
        sa.Column("cost", Amount, nullable=False),
        sa.Column("seq", sa.BigInteger, sa.ForeignKey("transactions.seq"), nullable=False),
    )
    op.create_index("jobs_by_wallet", "jobs", ["wallet", "settled_at"])
    op.create_table(
        "stages",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("stage", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("peer_id", sa.Text, nullable=False, index=True),
        sa.Column("first_layer", sa.BigInteger, nullable=False),
        sa.Column("end_layer", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("token_layers", sa.BigInteger, nullable=False),
        sa.Column("earned", Amount, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("receipt", sa.LargeBinary),
        sa.ForeignKeyConstraint(["job_id", "epoch"], ["jobs.job_id", "jobs.epoch"]),
        sa.CheckConstraint("state IN ('credited', 'held')", name="stage_state"),
    )


def _make_payouts() -> None:
    op.create_table(
        "deposits",
        sa.Column("chain", sa.Text, primary_key=True),
        sa.Column("txid", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("wallet", sa.Text, nullable=False, index=True),
        sa.Column("amount", Amount, nullable=False),
        sa.Column("seq", sa.BigInteger, sa.ForeignKey("transactions.seq"), nullable=False),
    )
    op.create_table(
        "payouts",
        sa.Column("payout_id", sa.Text, primary_key=True),
        sa.Column("peer_id", sa.Text, nullable=False, index=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("amount", Amount, nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("planned_at", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.Column("txid", sa.Text, nullable=False),
        sa.Column("fee", Amount, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.CheckConstraint("state IN ('planned', 'signed', 'sent', 'confirmed', 'failed')", name="payout_state"),
    )
    op.create_table(
        "payout_transactions",
        sa.Column("payout_id", sa.Text, sa.ForeignKey("payouts.payout_id"), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("txid", sa.Text, nullable=False, index=True),
        sa.Column("raw", sa.LargeBinary, nullable=False),
        sa.Column("nonce", sa.BigInteger),
        sa.Column("signed_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("payout_id", "txid", name="payout_signed_once"),
    )
