"""What `azu-dht watch` draws: a header, and as much of peers and models as the terminal has lines for. No IO."""

from __future__ import annotations

import trio
from rich.console import Console
from rich.text import Text

from azu.dht.coverage import models_of
from azu.dht.models import LEGEND, show_models
from azu.dht.peers import nobody, show_peers, summary
from azu.dht.snapshot import Snapshot
from azu.dht.text import duration, printable
from azu.errors import AzuError

__all__ = ["Window"]

_HEADER_LINES = 3


class Window:
    """The picture as of now. `changed` is set when there is something new to draw, and replaced each time."""

    def __init__(self, console: Console, way_in: str, interval: float) -> None:
        self.changed = trio.Event()
        self._console = console
        self._way_in = way_in
        self._interval = interval
        self._snapshot: Snapshot | None = None
        self._error: AzuError | None = None
        self._top = 0  # the first line of the body that is shown
        self._drawn: tuple[Snapshot | None, int] | None = None  # what the body was made of: snapshot and width
        self._body: list[str] = []

    @property
    def page(self) -> int:
        """Lines that the body has on the terminal."""
        return max(1, self._console.height - _HEADER_LINES)

    def show(self, snapshot: Snapshot) -> None:
        """Draw this from now on."""
        self._snapshot, self._error = snapshot, None
        self._change()

    def tell(self, error: AzuError) -> None:
        """Say what went wrong above what was drawn last."""
        self._error = error
        self._change()

    def scroll(self, lines: int) -> None:
        """Move down, or up where negative."""
        self._top += lines
        self._change()

    def picture(self, now: float) -> Text:
        """The whole terminal at `now` (unix seconds)."""
        self._lay_out()
        self._top = max(0, min(self._top, len(self._body) - self.page))
        shown = self._body[self._top : self._top + self.page]
        lines = [*self._header(now), *(Text.from_ansi(line) for line in shown)]
        picture = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
        picture.no_wrap, picture.overflow = True, "ellipsis"
        return picture

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def _header(self, now: float) -> list[Text]:
        place, keys = "", "q quits"
        if len(self._body) > self.page:
            last = min(self._top + self.page, len(self._body))
            place, keys = f"  lines {self._top + 1}-{last} of {len(self._body)}", f"{keys}, arrows and space scroll"
        title = Text.assemble(("azu-dht watch", "bold"), f"{place}  {keys}; every {self._interval:g} s")
        if self._error is not None:
            status = Text(f"refresh failed: {printable(str(self._error))}", style="bold red")
        elif self._snapshot is None:
            status = Text("asking the swarm ...")
        else:
            status = Text(f"{summary(self._snapshot)}; seen {duration(now - self._snapshot.taken_at)} ago")
        return [title, status, Text()]

    def _lay_out(self) -> None:
        """Make the body anew if the snapshot or the terminal's width is another."""
        wanted = (self._snapshot, self._console.width)
        if self._drawn is not None and self._drawn[0] is wanted[0] and self._drawn[1] == wanted[1]:
            return
        self._drawn = wanted
        self._body = [] if self._snapshot is None else self._rendered(self._snapshot)

    def _rendered(self, snapshot: Snapshot) -> list[str]:
        with self._console.capture() as captured:
            if snapshot.is_empty:
                self._console.print(Text(nobody(snapshot, self._way_in)))
            else:
                show_peers(self._console, snapshot, wide=False)
                if models_of(snapshot):
                    show_models(self._console, snapshot, wide=False)
                    self._console.print(Text(LEGEND))
        return captured.get().splitlines()
