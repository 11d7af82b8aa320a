"""What clients were given back, their API keys have not spent."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from azu.ledger.schema import Amount

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_REFUNDS = sa.text(
    """SELECT transactions.key, postings.amount FROM transactions JOIN postings ON postings.seq = transactions.seq
    WHERE transactions.kind = 'held-refunded' AND postings.account LIKE 'client:%'"""
).columns(key=sa.Text, amount=Amount)
_KEY = sa.text(
    """SELECT key_spending.key_id, key_spending.spent FROM key_spending
    JOIN reservations ON reservations.key_id = key_spending.key_id WHERE reservations.job_id = :job_id"""
).columns(key_id=sa.Text, spent=Amount)
_SPENT = sa.text("UPDATE key_spending SET spent = :spent WHERE key_id = :key_id").bindparams(
    sa.bindparam("spent", type_=Amount)
)


def upgrade() -> None:
    connection = op.get_bind()
    for key, amount in connection.execute(_REFUNDS).all():
        found = connection.execute(_KEY, {"job_id": key.split(":")[1]}).one_or_none()  # held:JOB:EPOCH:STAGE
        if found is not None:
            connection.execute(_SPENT, {"key_id": found.key_id, "spent": found.spent - amount})
