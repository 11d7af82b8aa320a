"""API keys, the challenges that they were made for, and the secret of challenges."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from azu.ledger.schema import Amount

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("wallet", sa.Text, nullable=False, index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("spending_limit", Amount),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
        sa.Column("revoked_at", sa.BigInteger),
    )
    op.create_table(
        "challenges",
        sa.Column("nonce", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "sign_in",
        sa.Column("id", sa.BigInteger, sa.CheckConstraint("id = 1", name="one_secret"), primary_key=True),
        sa.Column("secret", sa.LargeBinary, nullable=False),
    )
