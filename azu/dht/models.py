"""The models of a snapshot with their coverage, as cards for people and as a document for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from azu.dht.coverage import STATES, ModelView, models_of
from azu.dht.peers import left_out
from azu.dht.screen import is_roomy, show_card
from azu.dht.snapshot import Snapshot
from azu.dht.text import clip, printable, short_digest, short_ids, spans

__all__ = ["LEGEND", "coverage_bar", "model_fields", "model_title", "models_document", "no_model", "show_models"]

LEGEND = "A digit stands for a layer: how many workers have it loaded. + ten or more, ~ being loaded, . nobody."
_GROUP = 10  # layers between two spaces
_LONGEST_ROW = 50  # layers in one line: easy to count in, and good for 80 columns
_MOST_SPANS = 12
_LONGEST_NAME = 100  # characters
_CARD_INDENT = 14  # columns
_STYLES = {".": "bold red", "~": "yellow", "1": "yellow"}


def show_models(console: Console, snapshot: Snapshot, *, wide: bool) -> None:
    """The models as cards."""
    wide = wide or is_roomy(console)
    for view in models_of(snapshot):
        fields = model_fields(view, width=console.width - _CARD_INDENT, wide=wide)
        show_card(console, model_title(view, wide=wide), fields)


def model_title(view: ModelView, *, wide: bool) -> str:
    """The model's name."""
    if view.model_id is None:
        return "(a model that no coordinator offers)"
    return clip(printable(view.model_id), None if wide else _LONGEST_NAME)


def model_fields(view: ModelView, *, width: int, wide: bool) -> dict[str, Text]:
    """What is told of a model, for lines of at most `width` columns."""
    ids = short_ids(view.offered_by)
    missing = spans(view.missing, None if wide else _MOST_SPANS)
    offered = ", ".join(each if wide else ids[each] for each in view.offered_by)
    return {
        "manifest": Text(view.manifest if wide else short_digest(view.manifest)),
        "layers": Text(_layers(view)),
        "coverage": coverage_bar(view, width),
        "missing": Text(missing or "none", style="bold red" if missing else ""),
        "workers": Text(", ".join(f"{view.workers[state]} {state}" for state in STATES)),
        "offered by": Text(offered or "nobody"),
    }


def coverage_bar(view: ModelView, width: int) -> Text:
    """One character a layer, in groups of ten, each line led by its first layer's number."""
    row = max(_GROUP, min(_LONGEST_ROW, (width - 4) // (_GROUP + 1) * _GROUP))
    bar = Text()
    for layer in range(len(view.replicas)):
        if layer % row == 0:
            bar.append(f"{'' if layer == 0 else chr(10)}{layer:>3} ", style="dim")
        elif layer % _GROUP == 0:
            bar.append(" ")
        mark = _mark(view.replicas[layer], view.loading[layer])
        bar.append(mark, style=_STYLES.get(mark, "green"))
    return bar if view.replicas else Text("-")


def models_document(snapshot: Snapshot) -> dict[str, Any]:
    """Every model with its replicas by layer; ranges are [start, end)."""
    views = [_entry(view) for view in models_of(snapshot)]
    return {"models": views, **left_out(snapshot)}


def no_model(way_in: str) -> str:
    """What to advise where nobody offers a model, or has layers of one."""
    return (
        "No coordinator here offers a model, and no worker holds layers of one.\n"
        f"  to offer one:  azu-coordinator serve --bootstrap {way_in} --model PATH_OR_HUB_ID"
    )


def _entry(view: ModelView) -> dict[str, Any]:
    return {
        "model_id": view.model_id,
        "manifest": view.manifest,
        "n_layers": view.n_layers,
        "complete": view.is_complete,
        "replicas": list(view.replicas),
        "missing": [{"start": start, "end": end} for start, end in view.missing],
        "workers": dict(view.workers),
        "offered_by": list(view.offered_by),
    }


def _mark(count: int, is_loading: bool) -> str:
    if count == 0:
        return "~" if is_loading else "."
    return str(count) if count < 10 else "+"


def _layers(view: ModelView) -> str:
    loaded = sum(count > 0 for count in view.replicas)
    if view.n_layers is None:
        return f"unknown; workers name {len(view.replicas)}, {loaded} loaded"
    if view.is_complete:
        return f"{view.n_layers}, all loaded, each by at least {min(view.replicas)}"
    return f"{view.n_layers}, {loaded} loaded"
