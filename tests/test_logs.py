from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import NetworkError
from azu.logs import OURS, REDACTED, configure_logging, is_json, log, show_status

logger = logging.getLogger("node.engine.runner")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process's logging as pytest set it up."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    levels = {name: logging.getLogger(name).level for name in OURS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, former in levels.items():
        logging.getLogger(name).setLevel(former)
    logging.captureWarnings(False)


def started(*, json: bool = True, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logging(json=json, level=level, program="azu-node", stream=stream)
    return stream


def only_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    return json.loads(line)


def fields_of(**fields: object) -> dict[str, Any]:
    stream = started()
    log(logger, logging.INFO, "event", **fields)
    return only_line(stream)["fields"]


def test_json_line() -> None:
    stream = started()
    log(logger, logging.INFO, "stage loaded", layers="0..11", seconds=1.5, event="a field of that name too")
    entry = only_line(stream)
    assert entry.pop("ts").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "node.engine.runner",
        "event": "stage loaded",
        "program": "azu-node",
        "fields": {"layers": "0..11", "seconds": 1.5, "event": "a field of that name too"},
    }
    assert is_json()


def test_json_has_the_stack_trace_and_stays_one_line() -> None:
    stream = started()
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        logger.exception("it broke\nbadly")
    entry = only_line(stream)
    assert entry["event"] == "it broke\nbadly"
    assert "ZeroDivisionError" in entry["exc"]
    assert "fields" not in entry


def test_human_line() -> None:
    stream = started(json=False)
    log(logger, logging.WARNING, "stage loaded", model="Smol LM", layers="0..11", n=3, empty="", many=[1, 2])
    line = stream.getvalue()
    assert line.endswith(
        'warning engine.runner        stage loaded  model="Smol LM" layers=0..11 n=3 empty="" many=[1, 2]\n'
    )
    assert not is_json()


def test_human_tells_our_errors_in_one_line_and_bugs_in_full() -> None:
    stream = started(json=False)
    log(logger, logging.ERROR, "peer lost", exc_info=NetworkError("it went away", remedy="try later"))
    assert stream.getvalue().endswith('peer lost  error="it went away. try later"\n')
    log(logger, logging.ERROR, "oops", exc_info=KeyError("x"))
    assert "KeyError: 'x'" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "painted"), [(None, True), ("1", False)])
def test_colour_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch, no_color: str | None, painted: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        configure_logging(json=False, level="info", program="azu-node", stream=stream)
        logger.warning("careful")
    assert ("\x1b[33m" in terminal.getvalue()) is painted
    assert "\x1b" not in pipe.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "seed",
        "private_key",
        "privateKey",
        "secret",
        "client_secret",
        "token",
        "api_token",
        "API_KEY",
        "password",
        "Authorization",
    ],
)
def test_secrets_are_never_written(name: str) -> None:
    assert fields_of(**{name: "hunter2", "inner": {name: ["hunter2"]}}) == {name: REDACTED, "inner": {name: REDACTED}}


@pytest.mark.parametrize(
    "name", ["tokens", "max_tokens", "tokens_per_second", "token_layers", "public_key", "peer", "key"]
)
def test_counts_and_names_are_written(name: str) -> None:
    assert fields_of(**{name: 5}) == {name: 5}


def test_values_are_bounded_and_fit_json() -> None:
    deep: Any = "bottom"
    for _ in range(20):
        deep = [deep]
    fields = fields_of(
        text="x" * 10_000, data=b"1234", many=range(3), items=list(range(1000)), deep=deep, nan=float("nan")
    )
    assert len(fields["text"]) < 2100
    assert fields["data"] == "(4 bytes)"
    assert fields["many"] == "range(0, 3)"
    assert len(fields["items"]) == 50
    assert fields["nan"] == "nan"
    assert len(json.dumps(fields["deep"])) < 30


@given(st.text(), st.text())
def test_a_peer_cannot_forge_lines_or_steer_the_terminal(event: str, value: str) -> None:
    stream = started(json=False)
    log(logger, logging.INFO, event.replace("%", ""), agent=value)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue()[:-1].isprintable()
    stream = started()
    log(logger, logging.INFO, event.replace("%", ""), agent=value)
    assert only_line(stream)["fields"] == {"agent": value}


def test_levels() -> None:
    # A name that no module of ours knows: azu.overlay gives libp2p's loggers a level of their own.
    library = logging.getLogger("somebodys.library")
    stream = started(level="info")
    library.info("chatter")
    logging.getLogger("node").debug("detail")
    assert stream.getvalue() == ""
    library.warning("trouble")
    assert only_line(stream)["logger"] == "somebodys.library"
    stream = started(level="debug")
    library.debug("chatter")
    assert only_line(stream)["level"] == "debug"


def test_a_second_call_replaces_the_first() -> None:
    first, second = started(), started()
    logger.info("once")
    assert first.getvalue() == ""
    assert only_line(second)["event"] == "once"


def lines_of(terminal: io.StringIO) -> list[str]:
    """What a person sees in the end."""
    return [line.split("\r\x1b[2K")[-1] for line in terminal.getvalue().split("\n")]


def test_a_status_line_stays_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    configure_logging(json=False, level="info", program="azu-node", stream=terminal)
    assert show_status("10% of\x1b[2J it")
    log(logger, logging.INFO, "one")
    assert lines_of(terminal)[0].endswith("one")
    assert lines_of(terminal)[1] == "10% of\\x1b[2J it"
    assert show_status("x" * 100)
    log(logger, logging.INFO, "two")
    assert lines_of(terminal)[1].endswith("two")
    assert lines_of(terminal)[2] == "x" * 39
    assert show_status("")
    log(logger, logging.INFO, "three")
    assert [line[-5:] for line in lines_of(terminal)] == ["  one", "  two", "three", ""]


@pytest.mark.parametrize("json", [True, False])
def test_there_is_no_status_line_but_in_a_terminal(json: bool) -> None:
    stream = started(json=json)
    assert not show_status("10%")
    assert stream.getvalue() == ""
