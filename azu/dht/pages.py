"""All peers, or all models, of a snapshot on a console."""

from __future__ import annotations

from rich.console import Console

from azu.dht.coverage import models_of
from azu.dht.models import model_fields, model_title
from azu.dht.peers import peer_rows
from azu.dht.screen import is_roomy, show_card, show_rows
from azu.dht.snapshot import Snapshot

__all__ = ["show_models", "show_peers"]

_CARD_INDENT = 14  # columns


def show_peers(console: Console, snapshot: Snapshot, *, wide: bool) -> None:
    """The peers as a table, or as cards; there must be one."""
    show_rows(console, peer_rows(snapshot, wide=wide or is_roomy(console)), optional=("AGENT", "ADDRESSES"))


def show_models(console: Console, snapshot: Snapshot, *, wide: bool) -> None:
    """The models as cards."""
    wide = wide or is_roomy(console)
    for view in models_of(snapshot):
        fields = model_fields(view, width=console.width - _CARD_INDENT, wide=wide)
        show_card(console, model_title(view, wide=wide), fields)
