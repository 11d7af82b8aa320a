"""Submitted jobs, and what came of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "submitted",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, nullable=False, index=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("model_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("came_ns", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger, index=True),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("chars", sa.BigInteger, nullable=False),
    )
