"""Tables on stdout, and cards where a terminal is too narrow for one.

A terminal gets colours and its own width. Anything else gets plain text as wide as it needs to be, one row a line, so
that grep and less find whole rows.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["Row", "is_roomy", "open_console", "show_card", "show_rows"]

Row = Mapping[str, str]  # heading -> text, which may have several lines

ROOMY = 200  # columns; a terminal this wide is shown peer ids and addresses in full
_UNBOUNDED = 100_000  # columns of what is no terminal
_FLEXIBLE = ("DEVICE", "LAYERS", "ADDRESSES")  # columns that may be folded at their spaces
_LONGEST_WORD = 24  # columns; a longer one may be cut, so that one peer's fancy does not end the table for all
_NUMERIC = ("JOBS", "MS/LAYER", "AGE", "RTT", "BITS", "TIME", "NAMED")


def open_console(stream: TextIO | None = None) -> Console:
    """The console for this process's stdout, or for another stream.

    A terminal that cannot show a character gets its escape instead of an error.
    """
    stream = sys.stdout if stream is None else stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=is_terminal,
        width=None if is_terminal else _UNBOUNDED,
        highlight=False,
        markup=False,
        emoji=False,
    )


def is_roomy(console: Console) -> bool:
    """Whether this is a terminal on which nothing needs to be shortened."""
    return console.is_terminal and console.width >= ROOMY


def show_rows(console: Console, rows: Sequence[Row], *, optional: Collection[str]) -> None:
    """One table of all rows; without the `optional` columns, or as cards, where it would not fit."""
    if not console.is_terminal:
        rows = [{heading: text.replace("\n", "; ") for heading, text in row.items()} for row in rows]
    for left_out in ((), optional):
        table = _table(rows, left_out)
        if Measurement.get(console, console.options.update(max_width=_UNBOUNDED), table).minimum <= console.width:
            console.print(table)
            console.print()
            return
    for row in rows:
        title, kind, *fields = row
        show_card(
            console,
            f"{row[title]}  {row[kind]}",
            {field.lower(): Text(row[field]) for field in fields if row[field] != "-"},
        )


def show_card(console: Console, title: str, fields: Mapping[str, Text]) -> None:
    """One thing with its properties below each other."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        grid.add_row(Text(f"  {name}"), value)
    console.print(Text(title, style="bold", overflow="fold"))
    console.print(grid)
    console.print()


def _table(rows: Sequence[Row], left_out: Collection[str]) -> Table:
    headings = [heading for heading in rows[0] if heading not in left_out]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in headings:
        justify: JustifyMethod = "right" if heading in _NUMERIC else "left"
        width = _least_width(heading, [row[heading] for row in rows])
        table.add_column(Text(heading), justify=justify, overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(Text(row[heading]) for heading in headings))
    return table


def _least_width(heading: str, texts: Sequence[str]) -> int:
    """How narrow a column may get. Left to itself, rich squeezes columns until their words are cut."""
    if heading not in _FLEXIBLE:
        return max(cell_len(text) for text in (heading, *texts))
    words = (word for text in (heading, *texts) for word in text.split())
    return min(_LONGEST_WORD, max(cell_len(word) for word in words))
