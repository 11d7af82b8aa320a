"""The ledger: double-entry, append-only, in SQLite or PostgreSQL.

pure     accounts, digests, page, operations, payouts    what may happen, and what it does
shell    schema, migrations, upgrade, database, store    where it is kept
         writer                                          one thread that commits what waits, together
         reading, verifying, copying                     what can be asked
         decisions                                       what becomes of held earnings
         ledger                                          all of it, from trio
"""

from __future__ import annotations

from sqlalchemy import Connection

from azu.ledger.answers import (
    Closed,
    Deposited,
    Earning,
    EndedJob,
    Entry,
    JobUse,
    KeyLimit,
    Line,
    Payout,
    PayoutState,
    Refusal,
    Reserved,
    Shortfall,
    SignedPayout,
)
from azu.ledger.copying import copy_ledger
from azu.ledger.database import Database
from azu.ledger.decisions import HeldEarning, Outcome, find_held
from azu.ledger.ledger import Ledger
from azu.ledger.store import KeyLimits
from azu.ledger.verifying import Finding, verify

__all__ = [
    "Closed",
    "Connection",
    "Database",
    "Deposited",
    "Earning",
    "EndedJob",
    "Entry",
    "Finding",
    "HeldEarning",
    "JobUse",
    "KeyLimit",
    "KeyLimits",
    "Ledger",
    "Line",
    "Outcome",
    "Payout",
    "PayoutState",
    "Refusal",
    "Reserved",
    "Shortfall",
    "SignedPayout",
    "copy_ledger",
    "find_held",
    "verify",
]
