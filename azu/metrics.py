"""Health and metrics of a program over HTTP, for its operator: GET /healthz, /metrics, and /status where it has one.

The metrics are in Prometheus' text format 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/). It is meant for a loopback port: there are no accounts,
and a request whose Host is another name is refused, so that no web page can read it through a browser (DNS rebinding).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import h11
import trio

from azu.errors import InputError
from azu.logs import log
from azu.overlay import Overlay

__all__ = ["Metric", "Reporter", "overlay_metrics", "render", "resident_bytes", "serve_metrics"]

logger = logging.getLogger(__name__)

_REQUEST_S = 5.0
_MAX_REQUEST_BYTES = 8_192
_MAX_CONNECTIONS = 8
_PAGE_BYTES = 4_096  # of memory, in /proc/self/statm

Respond = Callable[[str], tuple[int, str, bytes]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One value, or one for each value of a label. name: without azu_; a counter's ends in _total."""

    name: str
    help: str
    kind: Literal["gauge", "counter"]
    value: float | Mapping[str, float]
    label: str = ""


class Reporter(Protocol):
    """What a program can tell besides what every node can."""

    def metrics(self) -> Iterable[Metric]:
        """Its own."""

    def status(self) -> Mapping[str, Any]:
        """The answer to GET /status, to be sent as JSON."""


def render(metrics: Iterable[Metric]) -> bytes:
    """The metrics as Prometheus reads them."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP azu_{metric.name} {metric.help}", f"# TYPE azu_{metric.name} {metric.kind}"]
        if isinstance(metric.value, Mapping):
            lines += [
                f'azu_{metric.name}{{{metric.label}="{_escape(key)}"}} {value:.17g}'
                for key, value in metric.value.items()
            ]
        else:
            lines.append(f"azu_{metric.name} {metric.value:.17g}")
    return "".join(f"{line}\n" for line in lines).encode()


def overlay_metrics(overlay: Overlay, started_at: float, agent: str) -> list[Metric]:
    """What every node can say of itself. started_at: unix seconds."""
    now = overlay.statistics()
    metrics = [
        Metric("build_info", "The program and its version.", "gauge", {agent: 1}, "agent"),
        Metric("uptime_seconds", "Since the start.", "gauge", time.time() - started_at),
        Metric("memory_bytes", "Resident memory.", "gauge", resident_bytes()),
        Metric("connections", "Live connections.", "gauge", now.connections),
        Metric("streams", "Open streams, both directions.", "gauge", now.streams),
        Metric("routing_table_peers", "Peers in the DHT's routing table.", "gauge", now.routing_table),
        Metric("dht_records", "Records stored for others.", "gauge", now.records),
        Metric("dht_provided_keys", "Keys whose providers are stored.", "gauge", now.provided_keys),
        Metric("refused_connections_total", "Connections turned away by their address.", "counter", now.refused),
        Metric("evicted_connections_total", "Idle connections closed for newcomers.", "counter", now.evicted),
        Metric("banned_peers", "Peers that are banned for breaking protocols.", "gauge", len(now.banned)),
        Metric("violations_total", "Broken protocols, of all peers.", "counter", sum(now.violations.values())),
        Metric("reach", "How others connect to this node.", "gauge", {overlay.finding.reach.name.lower(): 1}, "by"),
    ]
    relay = overlay.relay_statistics()
    if relay is not None:
        metrics += [
            Metric("relay_reservations", "Peers that may be reached through here.", "gauge", relay.reservations),
            Metric("relay_circuits", "Connections through here.", "gauge", relay.circuits),
            Metric("relay_bytes_total", "Bytes carried for others.", "counter", relay.carried),
            Metric("relay_refused_total", "Requests refused.", "counter", relay.refused),
        ]
    return metrics


async def serve_metrics(
    overlay: Overlay,
    address: tuple[str, int],
    agent: str,
    reporter: Reporter | None = None,
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled; reports the URL once it listens.

    Raises:
        InputError: the port is taken, or the address is none of this machine's.
    """
    host, port = address
    respond = partial(_respond, overlay, time.time(), agent, reporter)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise InputError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}",
            code="port_taken",
            remedy="Give --metrics another address",
        ) from error
    port = listeners[0].socket.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    log(logger, logging.INFO, "metrics", url=f"http://{shown}:{port}/metrics")
    limit = trio.CapacityLimiter(_MAX_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        handler = partial(_handle, respond=respond, hosts={f"{shown}:{port}", f"localhost:{port}"}, limit=limit)
        nursery.start_soon(partial(trio.serve_listeners, handler, listeners))
        task_status.started(f"http://{shown}:{port}")


def _respond(
    overlay: Overlay, started_at: float, agent: str, reporter: Reporter | None, path: str
) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    if path == "/metrics":
        own = reporter.metrics() if reporter is not None else ()
        return 200, "text/plain; version=0.0.4", render([*overlay_metrics(overlay, started_at, agent), *own])
    if path == "/healthz":
        health: dict[str, Any] = {
            "status": "ok",
            "peer_id": overlay.peer_id,
            "agent": agent,
            "uptime_s": round(time.time() - started_at, 1),
            "connections": overlay.statistics().connections,
            "reach": str(overlay.finding),
        }
        return 200, "application/json", json.dumps(health).encode()
    if path == "/status" and reporter is not None:
        return 200, "application/json", json.dumps(reporter.status()).encode()
    return 404, "text/plain", b"GET /healthz or /metrics\n"


async def _handle(stream: trio.SocketStream, *, respond: Respond, hosts: set[str], limit: trio.CapacityLimiter) -> None:
    """One request on one connection."""
    async with stream:
        try:
            limit.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            with trio.move_on_after(_REQUEST_S):
                await _answer(stream, respond, hosts)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
            log(logger, logging.DEBUG, "metrics request", reason=repr(error))
        finally:
            limit.release()


async def _answer(stream: trio.SocketStream, respond: Respond, hosts: set[str]) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_REQUEST_BYTES)
    status, kind, body = 400, "text/plain", b"malformed request\n"
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(_MAX_REQUEST_BYTES))
        if isinstance(event, h11.Request):
            status, kind, body = _decide(event, respond, hosts)
    except h11.RemoteProtocolError as error:
        log(logger, logging.DEBUG, "malformed metrics request", reason=str(error))
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
    await _send(stream, connection, h11.Response(status_code=status, headers=headers))
    await _send(stream, connection, h11.Data(data=body))
    await _send(stream, connection, h11.EndOfMessage())


async def _send(stream: trio.SocketStream, connection: h11.Connection, event: h11.Event) -> None:
    data = connection.send(event)
    if data:
        await stream.send_all(data)


def _decide(request: h11.Request, respond: Respond, hosts: set[str]) -> tuple[int, str, bytes]:
    host = dict(request.headers).get(b"host", b"").decode("latin-1")
    if host not in hosts:
        return 403, "text/plain", b"this is for requests to its own address only\n"
    if request.method != b"GET":
        return 405, "text/plain", b"GET only\n"
    return respond(request.target.decode("latin-1").split("?")[0])


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def resident_bytes() -> int:
    """Of this process's memory; 0 where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
