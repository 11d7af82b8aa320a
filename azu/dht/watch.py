"""`azu-dht watch`: the peers and models of a swarm on the whole terminal, asked for again and again.

Three tasks share one overlay: one asks the swarm, one draws, one reads the keyboard. A refresh that fails leaves the
last picture where it is, and says so above it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import trio

from azu.config import DhtSettings
from azu.dht.models import models_document
from azu.dht.peers import peers_document, way_in
from azu.dht.screen import open_console
from azu.dht.snapshot import Snapshot
from azu.dht.survey import look
from azu.dht.visit import rejoin, visit
from azu.dht.window import Window
from azu.errors import AzuError, InputError
from azu.overlay import Overlay

__all__ = ["watch"]

_REDRAW_SECONDS = 1.0  # the terminal's size may change, and the time since the last refresh does
_KEY = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_QUIT = (b"q", b"Q", b"\x04")  # the last is Ctrl-D
# Keys as terminals send them -> lines to scroll, or pages.
_LINES = {b"j": 1, b"\x1b[B": 1, b"\x1bOB": 1, b"k": -1, b"\x1b[A": -1, b"\x1bOA": -1}
_PAGES = {b" ": 1, b"\x1b[6~": 1, b"b": -1, b"\x1b[5~": -1}


async def watch(settings: DhtSettings, *, interval: float) -> None:
    """Show the swarm until q or Ctrl-C; with --json, print a document a line for each refresh.

    Raises:
        InputError: stdout is no terminal that can be drawn on. NetworkError: nobody answers at the start.
    """
    if settings.as_json:
        async with visit(settings) as overlay:
            await _refresh(overlay, settings, interval, _print_snapshot, _print_error)
        return
    console = open_console()
    if not console.is_terminal or console.is_dumb_terminal:
        raise InputError(
            "stdout is not a terminal that can be drawn on",
            code="no_terminal",
            remedy="Run it in a terminal, or add --json for one JSON document a line",
        )
    async with visit(settings) as overlay:
        window = Window(console, way_in(settings), interval)
        with _keyboard() as keyboard, console.screen(hide_cursor=True) as screen:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_refresh, overlay, settings, interval, window.show, window.tell)
                nursery.start_soon(_draw, window, screen.update)
                await _obey(keyboard, window)
                nursery.cancel_scope.cancel()


async def _refresh(
    overlay: Overlay,
    settings: DhtSettings,
    interval: float,
    show: Callable[[Snapshot], None],
    tell: Callable[[AzuError], None],
) -> None:
    """Look round every `interval` seconds, for ever; a look that fails is told, and the next one tried all the same."""
    while True:
        try:
            show(await _look(overlay, settings))
        except AzuError as error:
            tell(error)
        await trio.sleep(interval)


async def _look(overlay: Overlay, settings: DhtSettings) -> Snapshot:
    if not overlay.connected_peers():
        await rejoin(overlay, settings)
    snapshot = await look(overlay, with_rtt=True)
    if snapshot.is_empty and not overlay.connected_peers():  # it is us who lost the swarm
        await rejoin(overlay, settings)
        snapshot = await look(overlay, with_rtt=True)
    return snapshot


async def _draw(window: Window, update: Callable[..., None]) -> None:
    while True:
        update(window.picture(time.time()))
        with trio.move_on_after(_REDRAW_SECONDS):
            await window.changed.wait()


async def _obey(keyboard: int | None, window: Window) -> None:
    """Scroll as the keys say, and return when one says to quit."""
    if keyboard is None:
        await trio.sleep_forever()
    while True:
        await trio.lowlevel.wait_readable(keyboard)
        pressed = os.read(keyboard, 64)
        for key in _KEY.findall(pressed):
            if key in _QUIT:
                return
            window.scroll(_LINES.get(key, 0) + _PAGES.get(key, 0) * window.page)
        if not pressed:  # the terminal is gone
            return


@contextmanager
def _keyboard() -> Iterator[int | None]:
    """The terminal that keys come from, one by one and unseen; None where stdin is none.

    Ctrl-C stays what it is. Ctrl-Z is switched off: it would leave the shell on our screen.
    """
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        ours = termios.tcgetattr(descriptor)
        ours[6][termios.VSUSP] = bytes([os.fpathconf(descriptor, "PC_VDISABLE")])
        termios.tcsetattr(descriptor, termios.TCSADRAIN, ours)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _print_snapshot(snapshot: Snapshot) -> None:
    _print_line({"taken_at": snapshot.taken_at, "error": None, **peers_document(snapshot), **models_document(snapshot)})


def _print_error(error: AzuError) -> None:
    known = {"code": error.code, "message": error.message, "remedy": error.remedy}
    _print_line({"taken_at": time.time(), "error": known})


def _print_line(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document))
