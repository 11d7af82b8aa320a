"""What the demo shows while the swarm comes up: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from azu.demo.processes import Process

__all__ = ["Screen"]

# What a program's log records mean to a reader; {name} is a field of the record.
_MEANINGS = {
    "bootstrap node ready": "ready",
    "publishing model": "cutting the model into layers",
    "model published": "model cut into {layers} layers",
    "answering OpenAI clients": "answering at {url}",
    "worker starting": "started with {vram} on {device}",
    "joined the swarm": "joined the swarm",
    "cannot join yet": "cannot join yet: {reason}",
    "fetching layers": "fetching layers {layers} ({size})",
    "stage ready": "layers {layers} ready",
    "cannot load the assigned layers": "cannot load layers {layers}: {reason}",
}


class Screen:
    """Follows the log records of the demo's processes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, str] = {}
        self._model, self._layers, self._missing = "", 0, 0
        self._live = Live(console=console, refresh_per_second=8, transient=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def set_model(self, model_id: str, n_layers: int) -> None:
        """Name the model whose layers are to be covered."""
        self._model, self._layers, self._missing = model_id, n_layers, n_layers
        self._redraw()

    def set_missing(self, layers: int) -> None:
        """So many layers are not loaded anywhere yet."""
        self._missing = layers
        self._redraw()

    def add(self, name: str) -> None:
        """A process is being started."""
        self._set(name, "starting")

    def take(self, process: Process, event: dict[str, Any]) -> None:
        """Show a log record, if it means something to a reader."""
        meaning = _MEANINGS.get(str(event.get("event")))
        if meaning is not None:
            fields = {key: str(value) for key, value in (event.get("fields") or {}).items()}
            self._set(process.name, meaning.format_map(_Missing(fields)))

    def _set(self, name: str, state: str) -> None:
        self._states[name] = state
        if self._live is None:
            self._console.print(Text(f"{name:<12} {state}"))
        self._redraw()

    def _redraw(self) -> None:
        if self._live is None:
            return
        table = Table("process", "state")
        for name, state in self._states.items():
            table.add_row(name, Text(state))
        ready = self._layers - self._missing
        bar = Columns(
            [ProgressBar(max(self._layers, 1), ready, width=30), f"{self._model} {ready}/{self._layers} layers"]
        )
        self._live.update(Group(table, bar) if self._layers else table)


class _Missing(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "?"
