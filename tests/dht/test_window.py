"""What watch draws: it fits every terminal, scrolls within bounds, and keeps the last picture when a refresh fails."""

from __future__ import annotations

import io

import pytest

from azu.dht.screen import open_console
from azu.dht.snapshot import Snapshot
from azu.dht.window import Window
from azu.errors import NetworkError
from tests.dht.records import MODEL, NOW, coordinator, held, identity, offer, snapshot, worker
from tests.dht.swarm import EVIL

WAY_IN = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWX --swarm-key swarm.key"
CROWD = snapshot(*(worker(number, held(0, 12), device=EVIL) for number in range(1, 31)), coordinator(99, offer()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def window(columns: int = 120, lines: int = 20, shown: Snapshot | None = CROWD) -> Window:
    console = open_console(Terminal())
    console.size = (columns, lines)  # type: ignore[assignment]
    made = Window(console, WAY_IN, 5.0)
    if shown is not None:
        made.show(shown)
    return made


def lines_of(shown: Window, now: float = NOW) -> list[str]:
    return shown.picture(now).plain.split("\n")


@pytest.mark.parametrize("columns", [20, 80, 120, 240])
@pytest.mark.parametrize("lines", [4, 24, 100])
def test_it_has_at_most_the_terminals_lines(columns: int, lines: int) -> None:
    drawn = lines_of(window(columns, lines))
    assert len(drawn) <= lines
    assert drawn[0].startswith("azu-dht watch")
    assert not set("".join(drawn)) & {"\x1b", "\x07", "\r", "\u202e"}


def test_scrolling_stays_within_the_body() -> None:
    shown = window(lines=10)
    first = lines_of(shown)
    assert "lines 1-7 of" in first[0]
    shown.scroll(-5)
    assert lines_of(shown) == first
    shown.scroll(3)
    assert lines_of(shown)[3] == first[6]
    shown.scroll(shown.page)
    assert "lines 11-17 of" in lines_of(shown)[0]
    shown.scroll(10_000)
    last = lines_of(shown)
    assert "a digit stands for a layer" in last[-1].lower()
    shown.scroll(10_000)
    assert lines_of(shown) == last


def test_peers_and_models_are_both_there() -> None:
    drawn = lines_of(window(150, 200))
    assert identity(7).peer_id[-8:] in "\n".join(drawn)
    assert MODEL in drawn
    assert any("0 +++++" in line for line in drawn)
    assert "lines" not in drawn[0], "everything is shown"
    assert drawn[1] == "1 coordinator, 30 workers; seen 0 s ago"
    assert lines_of(window(150, 200), NOW + 7)[1].endswith("seen 7 s ago")


def test_a_failed_refresh_leaves_the_picture() -> None:
    shown = window(lines=12)
    before = lines_of(shown)
    shown.tell(NetworkError(f"gone {EVIL}", remedy="look for it"))
    after = lines_of(shown)
    assert after[3:] == before[3:]
    assert after[1].startswith("refresh failed: gone \\x1b[2J")
    assert "look for it" in after[1]
    shown.show(CROWD)
    assert lines_of(shown) == before


def test_before_the_first_answer_and_in_an_empty_swarm() -> None:
    assert lines_of(window(shown=None))[1] == "asking the swarm ..."
    text = "\n".join(lines_of(window(shown=snapshot())))
    assert "no workers and no coordinators" in text
    assert f"azu-node join {WAY_IN}" in text


def test_another_width_is_laid_out_anew() -> None:
    shown = window(150, 50)
    assert "RTT" in lines_of(shown)[3]
    shown._console.size = (60, 50)  # type: ignore[assignment]
    assert "RTT" not in lines_of(shown)[3]
    assert "worker" in lines_of(shown)[3] or "coordinator" in lines_of(shown)[3]


async def test_whoever_draws_is_woken() -> None:
    shown = window()
    for change in (lambda: shown.scroll(1), lambda: shown.show(CROWD), lambda: shown.tell(NetworkError("x"))):
        waiting = shown.changed
        change()
        assert waiting.is_set()
        assert not shown.changed.is_set()
