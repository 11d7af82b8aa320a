"""A look-up's path as a tree: who named whom, in the order asked, whatever the peers claim."""

from __future__ import annotations

from azu.dht.tracing import trace_document, trace_rows, trace_summary
from azu.overlay import Hop, Trace
from tests.dht.records import identity
from tests.dht.swarm import EVIL

IDS = [identity(number).peer_id for number in range(1, 8)]


def hop(
    number: int, named_by: int | None = None, *, path: int = 0, seconds: float | None = 0.002, error: str = ""
) -> Hop:
    namer = None if named_by is None else IDS[named_by]
    return Hop(IDS[number], path, namer, 3 + number, seconds, 2, error)


def shape(trace: Trace, *, wide: bool = False) -> list[str]:
    return [f"{row['PEER']} {row['HOP']}" for row in trace_rows(trace, wide=wide)]


def short(number: int) -> str:
    return f"…{IDS[number][-8:]}"


TRACE = Trace(
    b"key",
    (hop(0), hop(1, path=1), hop(2, 0), hop(3, 1, path=1), hop(4, 0, seconds=None, error=EVIL), hop(5, 2)),
    (IDS[5], IDS[2]),
)


def test_each_stands_below_the_one_that_named_it() -> None:
    assert shape(TRACE) == [
        f"{short(0)} #1",
        f"├─{short(2)} #3",
        f"│ └─{short(5)} #6",
        f"└─{short(4)} #5",
        f"{short(1)} #2",
        f"└─{short(3)} #4",
    ]
    assert shape(TRACE, wide=True)[1] == f"├─{IDS[2]} #3"


def test_columns() -> None:
    rows = {row["HOP"]: row for row in trace_rows(TRACE, wide=False)}
    assert (rows["#1"]["NAMED BY"], rows["#3"]["NAMED BY"]) == ("here", short(0))
    assert (rows["#4"]["PATH"], rows["#4"]["BITS"], rows["#4"]["TIME"], rows["#4"]["NAMED"]) == (
        "1",
        "6",
        "2.0 ms",
        "2",
    )
    assert (rows["#5"]["TIME"], rows["#1"]["ERROR"]) == ("-", "-")
    assert rows["#5"]["ERROR"].startswith("\\x1b[2J")
    assert rows["#5"]["ERROR"].isprintable()


def test_a_peer_that_was_named_by_nobody_we_asked_is_a_root() -> None:
    orphan = Trace(b"k", (hop(1, 6), hop(2, 2), hop(0, 3), hop(3, 0)), ())
    assert shape(orphan) == [f"{short(1)} #1", f"{short(2)} #2", f"{short(0)} #3", f"└─{short(3)} #4"]


def test_the_summary() -> None:
    assert trace_summary(TRACE, 0.25, wide=False) == (
        f"6 peers asked on 2 paths in 0.25 s, 1 without an answer\nclosest to the key: {short(5)}, {short(2)}"
    )
    assert trace_summary(Trace(b"k", (), ()), 0.0, wide=False).endswith("closest to the key: nobody")
    assert trace_summary(Trace(b"k", (hop(0),), ()), 0.0, wide=False).startswith("1 peer asked on 1 path")


def test_the_document() -> None:
    document = trace_document(TRACE, "what was typed", 0.25)
    assert (document["asked_for"], document["key"], document["seconds"]) == ("what was typed", b"key".hex(), 0.25)
    assert [each["peer_id"] for each in document["hops"]] == [IDS[number] for number in (0, 1, 2, 3, 4, 5)]
    assert document["hops"][4]["time_ms"] is None
    assert (document["hops"][4]["error"], document["hops"][0]["error"]) == (EVIL, None)
    assert document["hops"][2]["named_by"] == IDS[0]
    assert document["closest"] == [IDS[5], IDS[2]]
