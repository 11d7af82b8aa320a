from __future__ import annotations

from tests.ledger.conftest import postgres, url

__all__ = ["postgres", "url"]
