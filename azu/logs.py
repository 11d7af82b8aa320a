"""Structured logs on stderr: lines for people, or one JSON object a line for collectors.

    logger = logging.getLogger(__name__)
    log(logger, logging.INFO, "stage loaded", model="SmolLM2", layers="0..11", seconds=1.8)

    14:03:11.204 info  node.service     stage loaded  model=SmolLM2 layers=0..11 seconds=1.8
    {"ts": "2026-01-31T13:03:11.204Z", "level": "info", "logger": "node.service", "event": "stage loaded",
     "program": "azu-node", "fields": {"model": "SmolLM2", "layers": "0..11", "seconds": 1.8}}

The event is a constant; what varies is a field. Values under names that mean a secret are never written, and neither
are control characters: what a peer says about itself may end up in a field.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, TextIO

from azu.errors import AzuError

__all__ = ["OURS", "configure_logging", "is_json", "log", "show_status"]

OURS = ("azu", "node", "coordinator", "bootstrap")
REDACTED = "[redacted]"

# A name is split at "_", "-", "." and capitals. These words anywhere in it mean a secret ...
_SECRET_WORDS = frozenset({"authorization", "cookie", "mnemonic", "passphrase", "password", "secret", "seed"})
# ... and these at its end: "token" and "api_token" are secret; "tokens", "max_tokens" and "token_layers" are counts.
_SECRET_ENDS = (("token",), ("private", "key"), ("secret", "key"), ("api", "key"), ("signing", "key"))
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")

_MAX_TEXT = 2_000  # characters of one value; a prompt or a page of HTML does not belong into a log
_MAX_ITEMS = 50  # entries of one list or mapping
_MAX_DEPTH = 4

_ERASE = "\r\x1b[2K"  # the line that the cursor is in
_COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}


def log(logger: logging.Logger, level: int, event: str, /, *, exc_info: object = None, **fields: object) -> None:
    """Log a constant event with its fields; `exc_info` as in logging.Logger.log."""
    logger.log(level, event, extra={"fields": fields}, exc_info=exc_info, stacklevel=2)  # type: ignore[arg-type]


def configure_logging(*, json: bool, level: str, program: str, stream: TextIO | None = None) -> None:
    """Send every log record of this process to stderr, once, in one form; a second call replaces the first.

    Our own loggers speak from `level` on; libraries from warnings on, unless `level` is debug.
    """
    stream = sys.stderr if stream is None else stream
    handler = _StatusHandler(stream)
    handler.setFormatter(JsonFormatter(program) if json else HumanFormatter(colour=_wants_colour(stream)))
    root = logging.getLogger()
    for old in [*root.handlers]:
        root.removeHandler(old)
    root.addHandler(handler)
    chosen = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(chosen if chosen == logging.DEBUG else max(chosen, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(chosen)
    logging.captureWarnings(True)


def show_status(text: str) -> bool:
    """Show a line below the log, in place of the last one; "" takes it away.

    Returns:
        whether there is one: not where the log goes to a file or a collector, is JSON, or tells of warnings only.
    """
    if not logging.getLogger(OURS[0]).isEnabledFor(logging.INFO):
        return False
    handlers = (handler for handler in logging.getLogger().handlers if isinstance(handler, _StatusHandler))
    return any(handler.show(_printable(text)) for handler in handlers)


class _StatusHandler(logging.StreamHandler[TextIO]):
    """Writes records, and below them a line that changes, where people look at it."""

    _status = ""

    def show(self, text: str) -> bool:
        """Show a line, cut to the terminal's width, or none; returns whether it can be seen."""
        if isinstance(self.formatter, JsonFormatter) or not self.stream.isatty() or os.environ.get("TERM") == "dumb":
            return False
        with self.lock or nullcontext():
            before, self._status = self._status, text[: shutil.get_terminal_size().columns - 1]
            if before or text:
                self.stream.write(_ERASE + self._status)
                self.flush()
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if not self._status:
            super().emit(record)
            return
        self.stream.write(_ERASE)
        super().emit(record)
        self.stream.write(self._status)
        self.flush()


def is_json() -> bool:
    """Whether stderr carries JSON lines, so that nothing else should be printed there."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, event, program, and where there are any fields and exc."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "program": self._program,
        }
        if fields := _fields(record):
            entry["fields"] = fields
        if record.exc_info and record.exc_info[1] is not None:
            entry["exc"] = self.formatException(record.exc_info)
        return jsonlib.dumps(entry, allow_nan=False)  # ASCII: other line ends, and halves of characters, stay escaped


class HumanFormatter(logging.Formatter):
    """One line for people; an error of azu's own is told in a line, anything else with its stack trace below."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone()
        level = record.levelname.lower()
        pairs = "".join(f" {key}={_shown(value)}" for key, value in _fields(record).items())
        line = (
            f"{moment:%H:%M:%S}.{int(record.msecs):03d} {self._paint(f'{level:<7}', level)} "
            f"{'.'.join(record.name.split('.')[-2:]):<20} {_printable(record.getMessage())}"
        )
        line += f" {pairs}" if pairs else ""
        if record.exc_info and (error := record.exc_info[1]) is not None:
            expected = isinstance(error, AzuError)
            line += f"  error={_shown(str(error))}" if expected else "\n" + self.formatException(record.exc_info)
        return line

    def _paint(self, text: str, level: str) -> str:
        code = _COLOURS.get(level)
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and code else text


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    cleaned = _clean(fields, depth=0) if isinstance(fields, Mapping) else {}
    return cleaned if isinstance(cleaned, dict) else {}


def _clean(value: object, *, depth: int) -> object:
    """The value as JSON can hold it: bounded, and with what is secret taken out."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)  # NaN compares false too; JSON has neither
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(value)} bytes)"
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        items = list(value.items())[:_MAX_ITEMS]
        return {str(k): REDACTED if _is_secret(str(k)) else _clean(v, depth=depth + 1) for k, v in items}
    if depth < _MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, depth=depth + 1) for item in list(value)[:_MAX_ITEMS]]
    return _clean(str(value), depth=depth) if depth < _MAX_DEPTH else f"({type(value).__name__})"


def _is_secret(name: str) -> bool:
    words = tuple(word.lower() for word in _WORD.findall(name))
    return not _SECRET_WORDS.isdisjoint(words) or any(words[-len(end) :] == end for end in _SECRET_ENDS)


def _shown(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set(' ="'):
        return value
    text = jsonlib.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else jsonlib.dumps(value)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
