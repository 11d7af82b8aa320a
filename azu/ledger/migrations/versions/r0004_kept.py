"""Requests that outlive their coordinator's process, and submitted jobs that are found by a key of their client's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("idempotency", "asked"):
        op.add_column("submitted", sa.Column(name, sa.Text, nullable=False, server_default=""))
    op.create_index("ix_submitted_idempotency", "submitted", ["idempotency"])
    op.create_table(
        "kept",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("leader", sa.Text, index=True),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("wallet", sa.Text, nullable=False),
        sa.Column("asked", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "kept_jobs",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, sa.ForeignKey("kept.request_id"), nullable=False, index=True),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("standing", sa.LargeBinary, nullable=False),
    )
