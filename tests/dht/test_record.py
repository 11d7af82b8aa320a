"""One record on a card: in force or not and why, and nothing of a stranger's text acts."""

from __future__ import annotations

import io
import json

import pytest

from azu.dht.kinds import standing
from azu.dht.lookups import Found
from azu.dht.record import record_fields, record_title, records_document, state_of
from azu.dht.screen import open_console, show_card
from azu.records import Record
from azu.tickets import CLOCK_SKEW_S
from tests.dht.records import MANIFEST, MODEL, NOW, coordinator, held, identity, offer, worker
from tests.dht.swarm import EVIL


def found(record: Record, kind: str = "worker", *, now: float = NOW, answers: bool | None = None) -> Found:
    return Found(f"/azu-{kind}/{record.peer_id}", kind, record, standing(record, now), answers)


def card(each: Found) -> str:
    stream = io.StringIO()
    show_card(open_console(stream), record_title(each), record_fields(each, NOW))
    return "\n".join(" ".join(line.split()) for line in stream.getvalue().splitlines())


def test_a_worker() -> None:
    me, relay = identity(1).peer_id, identity(9).peer_id
    circuit = f"/ip4/192.0.2.9/tcp/4001/p2p/{relay}/p2p-circuit/p2p/{me}"
    text = card(
        found(worker(1, held(0, 12), held(10, 20, "cached"), addrs=(f"/ip4/192.0.2.1/tcp/1/p2p/{me}", circuit)))
    )
    for line in (
        f"{me} worker",
        f"key /azu-worker/{me}",
        "state in force, 12 s old, for 60 s more",
        f"signed 2027-01-15 07:59:48 UTC, by this peer; sequence number {NOW * 1000}",
        "memory 3.0 GiB free of 8.0 GiB",
        "kv cache 8192 positions, 4096 for the next job to begin with",
        "speed 1.23 ms per token and layer",
        "lately not measured yet",
        "jobs 2; 0 of their steps wait",
        f"layers {MANIFEST}: 0-11 loaded, 12-19 cached",
        f"addresses /ip4/192.0.2.1/tcp/1/p2p/{me}",
        f"{circuit} (relayed)",
        "paid to nobody: earnings are only counted",
    ):
        assert line in text.splitlines()


def test_what_a_worker_measured() -> None:
    near, far = identity(2).peer_id, identity(3).peer_id
    links = [
        {"peer_id": near, "rtt_us": 1_520, "bytes_per_s": 12 << 20},
        {"peer_id": far, "rtt_us": 80_000, "relayed": True},
    ]
    speed = {"decode_base_ns": 1_200_000, "decode_token_ns": 30_000, "prefill_ns": 9_000}
    text = card(found(worker(1, speed=speed, waiting=3, links=links)))
    for line in (
        "lately 1.20 ms a layer and pass, 0.03 more for each token, 0.009 for one of a prompt",
        "jobs 2; 3 of their steps wait",
        f"links {near} 1.5 ms, 12.0 MiB/s",
        f"{far} 80.0 ms, relayed",
    ):
        assert line in text.splitlines()


def test_a_coordinator() -> None:
    text = card(found(coordinator(2, offer(), offer(4, "other", "cd" * 32)), "coordinator"))
    assert f"models {MODEL}: 30 layers, manifest {MANIFEST}" in text
    assert f"other: 4 layers, manifest {'cd' * 32}" in text
    assert "memory" not in text


def test_strangers_text_does_not_act() -> None:
    text = card(found(worker(1, agent=EVIL, device=EVIL, addrs=(EVIL,), protocols=(EVIL,), payout_address=EVIL)))
    text += card(found(coordinator(1, offer(1, EVIL)), "coordinator"))
    assert not set(text) & {"\x1b", "\x07", "\r", "\u202e"}
    assert text.count("\\x1b[2J\\x1b]0;owned\\x07[bold red]H100[/]\\r\\n\\u202e") == 6


def test_a_date_past_all_calendars() -> None:
    far = worker(1, issued_at=2**39, expires_at=2**39 + 9)
    assert f"signed at unix second {2**39}" in card(found(far))


@pytest.mark.parametrize(
    ("issued", "expires", "answers", "words"),
    [
        (-12, 60, None, "in force, 12 s old, for 60 s more"),
        (-600, -540, False, "expired 9 min ago, and the peer does not answer: it is gone, or cut off"),
        (-600, -540, True, "expired 9 min ago, but the peer answers: the clock here is ahead"),
        (
            CLOCK_SKEW_S + 90,
            9_999,
            None,
            f"dated {(CLOCK_SKEW_S + 90) // 60} min in the future: the clock here is behind",
        ),
    ],
)
def test_states(issued: int, expires: int, answers: bool | None, words: str) -> None:
    record = worker(1, issued_at=NOW + issued, expires_at=NOW + expires)
    text = state_of(found(record, answers=answers), NOW)
    assert text.startswith(words)
    assert ("`date -u`" in text) == ("clock" in words)


def test_the_document_says_the_same() -> None:
    gone = worker(1, held(0, 3), now=NOW - 600, device=EVIL)
    (entry,) = records_document([found(gone, answers=False)], NOW)["records"]
    assert (entry["state"], entry["answers"], entry["age_s"], entry["expires_in_s"]) == ("expired", False, 612, -540)
    assert (entry["device"], entry["peer_id"], entry["ranges"][0]["end"]) == (EVIL, identity(1).peer_id, 3)
    assert json.dumps(entry).isascii()
