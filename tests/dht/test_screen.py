"""Rows as tables and cards, in terminals of several widths and in none."""

from __future__ import annotations

import io
import re

import pytest

from azu.dht.coverage import models_of
from azu.dht.models import model_fields, model_title
from azu.dht.peers import peer_rows, peers_document, summary
from azu.dht.screen import open_console, show_card, show_rows
from azu.dht.snapshot import Pong, Seen, Snapshot
from tests.dht.records import MANIFEST, MODEL, NOW, coordinator, held, identity, offer, snapshot, worker

EVIL = "\x1b]0;owned\x07\x1b[2J[bold red]H100[/] :boom:\r\n\u202e"
SWARM = snapshot(
    worker(2, held(12, 30), held(10, 30, "cached")),
    worker(1, held(0, 12)),
    worker(3, device=EVIL, agent=EVIL[:64], addrs=(EVIL,), layer_us=0),
    coordinator(4, offer(), offer(2, EVIL, "ef" * 32)),
    expired=1,
    silent=2,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def shown(swarm: Snapshot, *, wide: bool = False, columns: int | None = None) -> str:
    stream = io.StringIO() if columns is None else Terminal()
    console = open_console(stream)
    if columns is not None:
        console.width = columns
    show_rows(console, peer_rows(swarm, wide=wide), optional=("AGENT", "ADDRESSES"))
    return stream.getvalue()


def unstyled(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_pipe_gets_one_plain_line_a_peer() -> None:
    lines = shown(SWARM).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines.pop() == ""
    assert "\x1b" not in "".join(lines)
    assert lines[0].split() == [
        *("PEER", "KIND", "DEVICE", "VRAM", "FREE", "LAYERS", "JOBS", "MS/LAYER", "AGE", "RTT", "PATH", "AGENT"),
        "ADDRESSES",
    ]
    assert [line.split()[1] for line in lines[2:]] == ["coordinator", "worker", "worker", "worker"]
    first = " ".join(lines[3].split())
    assert first == (
        f"…{identity(1).peer_id[-8:]} worker NVIDIA H100 80GB HBM3 3.0 GiB / 8.0 GiB {MODEL}: 0-11 loaded 2 1.23 12 s "
        "1.5 ms direct azu-node/0.1.0 /ip4/192.0.2.1/tcp/4001"
    )
    assert f"{MODEL}: 12-29 loaded, 10-11 cached" in lines[4]  # what is loaded is not named again as cached
    assert f"{MODEL}: 30 offered" in lines[2]


def test_wide_shortens_nothing() -> None:
    text = shown(SWARM, wide=True)
    assert all(identity(number).peer_id in text for number in (1, 2, 3, 4))
    assert "…" not in text


@pytest.mark.parametrize("columns", [20, 40, 80, 100, 120, 160, 200, 400])
@pytest.mark.parametrize("wide", [False, True])
def test_strangers_text_neither_acts_nor_vanishes(columns: int, wide: bool) -> None:
    text = shown(SWARM, wide=wide, columns=columns)
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert not set(text) & {"\x07", "\r", "\u202e"}
    squeezed = "".join(unstyled(text).split())
    assert "\\x1b]0;owned" in squeezed
    if wide:
        assert "[boldred]H100[/]:boom:" in squeezed or columns < 200  # no markup was read


def test_the_form_follows_the_width() -> None:
    honest = snapshot(worker(2, held(12, 30), held(10, 30, "cached")), worker(1, held(0, 12)), coordinator(4, offer()))

    def headings(columns: int, swarm: Snapshot = honest) -> str:
        return unstyled(shown(swarm, columns=columns)).splitlines()[0]

    assert "ADDRESSES" in headings(180)
    assert "RTT" in headings(120)
    assert "ADDRESSES" not in headings(120)
    assert "RTT" in headings(140, SWARM), "one peer's long words must not end the table for all"
    assert "KIND" not in headings(80)
    for columns in (30, 80, 110, 120, 140, 240):
        assert max(len(line) for line in unstyled(shown(SWARM, columns=columns)).splitlines()) <= columns
    card = unstyled(shown(honest, columns=80))
    assert "addresses  /ip4/192.0.2.1/tcp/4001" in card
    assert "ms/layer   1.23" in card


def test_a_flood_of_models_stays_short() -> None:
    flood = coordinator(1, *(offer(1, f"m{n}", f"{n:064x}") for n in range(64)))
    assert "m3: 1 offered; and 60 more" in shown(snapshot(flood))
    assert "m63" in shown(snapshot(flood), wide=True)


def test_a_model_on_a_card() -> None:
    stream = io.StringIO()
    (view, evil) = models_of(SWARM)[::-1]
    console = open_console(stream)
    assert view.model_id is not None
    for each in (view, evil):
        show_card(console, model_title(each, wide=False), model_fields(each, width=80, wide=False))
    text = stream.getvalue()
    assert "30, all loaded, each by at least 1" in text
    assert "  0 1111111111 1111111111 1111111111" in text
    assert MANIFEST[:12] in text
    assert "\x1b" not in text
    assert "\\x1b]0;owned" in text


def test_the_document_keeps_everything() -> None:
    document = peers_document(SWARM)
    assert (document["expired"], document["without_record"], len(document["peers"])) == (1, 2, 4)
    by_id = {each["peer_id"]: each for each in document["peers"]}
    assert by_id[identity(3).peer_id]["device"] == EVIL
    one = by_id[identity(1).peer_id]
    held = {"manifest": MANIFEST, "start": 0, "end": 12, "state": "loaded", "percent": 0, "model_id": MODEL}
    assert one["ranges"] == [held]
    assert (one["kind"], one["age_s"], one["rtt_ms"], one["path"]) == ("worker", 12.0, 1.5, "direct")
    assert (by_id[identity(4).peer_id]["rtt_ms"], by_id[identity(4).peer_id]["path"]) == (None, None)


def test_the_summary_counts() -> None:
    assert summary(SWARM) == ("1 coordinator, 3 workers; 1 expired record left out; 2 peers announced without a record")
    assert summary(snapshot(early=2)) == "0 coordinators, 0 workers; 2 records dated in the future left out"


def test_relayed_peers_are_told_apart() -> None:
    relay, me = identity(9).peer_id, identity(1).peer_id
    circuit = f"/ip4/192.0.2.9/tcp/4001/p2p/{relay}/p2p-circuit/p2p/{me}"
    relayed = Seen(worker(1, addrs=(circuit,)), Pong(0.042, "relayed"))
    seen = Snapshot(taken_at=NOW, workers=(relayed,))
    (row,) = peer_rows(seen, wide=False)
    assert (row["RTT"], row["PATH"]) == ("42.0 ms", "relayed")
    assert row["ADDRESSES"] == f"/ip4/192.0.2.9/tcp/4001/p2p/…{relay[-8:]}/p2p-circuit"
    (row,) = peer_rows(seen, wide=True)
    assert row["ADDRESSES"] == circuit.removesuffix(f"/p2p/{me}")
    (entry,) = peers_document(seen)["peers"]
    assert (entry["path"], entry["addrs"]) == ("relayed", [circuit])
