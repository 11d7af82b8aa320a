"""Alembic's entry: run the revisions on the connection that `azu.ledger.upgrade` hands over."""

from alembic import context

from azu.ledger.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
