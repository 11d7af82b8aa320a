"""A model's import in the terminal: a live line for each stage, or plain lines where stderr is none."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from azu.models.progress import Progress
from azu.sizes import format_size
from coordinator.shards import Rate

__all__ = ["ShardScreen", "progress_text"]

_LINE_EVERY_S = 5.0


def progress_text(progress: Progress, rate: float | None) -> str:
    """How far a stage is, in words; `rate` in bytes per second.

    "1.2 GiB of 4.0 GiB, 85.3 MiB/s, 34 s left", or "3 of 28 files".
    """
    if progress.stage == "waiting":
        return ""
    if progress.stage == "cutting":
        return f"{progress.done} of {progress.total} files"
    text = f"{format_size(progress.done)} of {format_size(progress.total)}"
    if not rate or rate < 1:
        return text
    left = (progress.total - progress.done) / rate
    return f"{text}, {format_size(round(rate))}/s" + (f", {left:.0f} s left" if left >= 1 else "")


class ShardScreen:
    """Shows progress; `show` may be called from any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            TextColumn("[dim]{task.fields[item]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._rate = Rate()
        self._stage = ""
        self._shown = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._stack.enter_context(self._bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(self, progress: Progress) -> None:
        """Bring the screen up to date."""
        now = time.monotonic()
        text = progress_text(progress, self._rate.update(progress, now))
        if self._console.is_terminal:
            self._draw(progress, text)
        elif progress.stage != self._stage or now >= self._shown + _LINE_EVERY_S:
            self._console.print(f"{progress.stage}: {text or progress.item}", soft_wrap=True)
            self._stage, self._shown = progress.stage, now

    def _draw(self, progress: Progress, text: str) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, text="", item="")
        total = progress.total or None
        self._bars.update(
            self._tasks[progress.stage], completed=progress.done, total=total, text=text, item=progress.item
        )
