"""`azu-node status`: what the worker that runs on a data folder tells of itself, as a page for its owner."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from azu.dht.text import duration, link_text, short_digest, speed_text
from azu.errors import NetworkError
from azu.records import Link, Speed
from azu.sizes import format_size
from node.settings import StatusSettings

__all__ = ["ADDRESS_FILE", "fetch_status", "print_status", "show_status"]

# In the data folder, while a worker runs: {"url": where it answers, "peer_id": who it is}.
ADDRESS_FILE = "status.json"
_PATIENCE_S = 5.0
_MAX_BYTES = 1 << 20


def print_status(settings: StatusSettings) -> None:
    """Raises NetworkError, code "not_running" or "no_answer", where there is nothing to print."""
    status = fetch_status(settings.data_dir)
    click.echo(json.dumps(status, indent=2) if settings.as_json else show_status(status))


def fetch_status(data_dir: Path) -> dict[str, Any]:
    """The status of the worker that holds a data folder.

    Raises:
        NetworkError: none does (code "not_running"), or it does not answer ("no_answer").
    """
    try:
        place = json.loads((data_dir / ADDRESS_FILE).read_bytes())
        address, peer_id = urlsplit(str(place["url"])).netloc, str(place["peer_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_running(data_dir) from error
    connection = http.client.HTTPConnection(address, timeout=_PATIENCE_S)  # past any proxy, which loopback has none of
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        body = answer.read(_MAX_BYTES)
        status = json.loads(body) if answer.status == 200 else None
    except TimeoutError as error:
        raise NetworkError(
            f"the worker of {data_dir} does not answer at {address} within {_PATIENCE_S:g} s",
            code="no_answer",
            remedy="It hangs, or its machine is too busy: look at its log, and restart it if that stands still",
        ) from error
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
    ) as error:  # it died, and nobody or somebody else has the port
        raise _not_running(data_dir) from error
    finally:
        connection.close()
    if not isinstance(status, dict) or status.get("peer_id") != peer_id:
        raise _not_running(data_dir)
    return status


def _not_running(data_dir: Path) -> NetworkError:
    return NetworkError(
        f"no worker runs on the data folder {data_dir}",
        code="not_running",
        remedy="Start it with `azu-node join`, or name the folder of the one that runs with --data-dir",
    )


def show_status(status: Mapping[str, Any]) -> str:
    """The page. Pure."""
    jobs, kv, loaded = status["jobs"], status["kv_tokens"], status["loaded"]
    start = status["since_start"]
    facts = {
        "reach": status["reach"],
        "listens": "\n".join(status["addrs"]) or "nowhere",
        "peers": f"{status['connections']} connected",
        "device": f"{status['device']}, {status['dtype']}, {format_size(status['offered_bytes'])} offered",
        "memory": f"{format_size(status['resident_bytes'])} resident",
        "layers": _layers(status),
        "speed": _speed(status),
        "jobs": f"{jobs['running']} running, {jobs['most']} at most, {jobs['admitted']} since the start"
        + ("; it leaves once others have taken them over" if status["leaving"] else ""),
        "kv cache": f"{kv['reserved']} of {kv['all']} tokens reserved, {kv['all'] - kv['reserved']} free, "
        f"{kv['filled']} filled",
        "traffic": f"hidden states {format_size(start['received_bytes'])} in, {format_size(start['sent_bytes'])} out; "
        f"layer files {format_size(status['layer_files_sent_bytes'])} sent",
        "links": "\n".join(map(_link, status["links"])) or "none measured yet",
    }
    if loaded is None:
        del facts["kv cache"], facts["speed"]
    lines = [f"{status['peer_id']}  {status['agent']}, up {duration(status['uptime_s'])}"]
    for label, text in facts.items():
        first, *more = text.split("\n")
        lines += [f"  {label:<9} {first}", *(f"  {'':<9} {line}" for line in more)]
    return "\n".join([*lines, "", *_table(status["last_minute"], start, status["largest_pass_steps"])])


def _layers(status: Mapping[str, Any]) -> str:
    loaded, loading = status["loaded"], status["loading"]
    if loaded is not None:
        first, end = loaded["layers"]
        name = loaded["model_id"] or short_digest(loaded["manifest"])
        return f"{first}-{end - 1} of {name}, {loaded['layer_us'] / 1000:.2f} ms per token and layer when loaded"
    if loading is not None:
        first, end = loading["layers"]
        return (
            f"{first}-{end - 1} of {short_digest(loading['manifest'])} are being loaded, {loading['percent']}% are here"
        )
    return "none: the log says why"


def _speed(status: Mapping[str, Any]) -> str:
    if status["loaded"] is None:
        return ""
    speed = Speed.model_validate(status["loaded"]["speed"])
    return f"{speed_text(speed)}; {status['waiting']:.1f} steps wait for a pass"


def _link(link: Mapping[str, Any]) -> str:
    return f"{link['peer_id']}  {link_text(Link.model_validate(link))}"


def _table(minute: Mapping[str, float], start: Mapping[str, float], largest: int) -> list[str]:
    rows = [(row[0], _cell(minute, *row[1:]), _cell(start, *row[1:])) for row in _ROWS]
    rows.insert(_LARGEST_AFTER, ("steps in the fullest pass", "", str(largest)))
    head = f"  {'':<46}{'last minute':>12}{'since start':>13}"
    return [head, *(f"  {label:<46}{one:>12}{other:>13}" for label, one, other in rows)]


# What is shown: of which sum, for each of what, in which unit.
_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("passes per second", "passes", "seconds", ""),
    ("tokens through these layers per second", "rows", "seconds", ""),
    ("steps in a pass", "steps", "passes", ""),
    ("compute, each pass", "compute_s", "passes", "ms"),
    ("wait for the device, each step", "waited_s", "steps", "ms"),
    ("serialise, each message", "serialise_s", "messages", "ms"),
    ("wait for room in the next stage, each message", "credit_s", "messages", "ms"),
    ("wire, each message", "wire_s", "messages", "ms"),
    ("rest of the ring, each step", "elsewhere_s", "inputs", "ms"),
    ("longest pass", "longest_pass_s", "", "ms"),
    ("event loop's longest stall", "longest_stall_s", "", "ms"),
    ("event loop busy", "loop_busy_s", "seconds", "%"),
)
_LARGEST_AFTER = 3


def _cell(spell: Mapping[str, float], name: str, each: str, unit: str) -> str:
    count = spell[each] if each else 1
    if not count:
        return "-"
    value = spell[name] / count * {"ms": 1000, "%": 100, "": 1}[unit]
    return f"{value:.2f}{' ' if unit == 'ms' else ''}{unit}"
