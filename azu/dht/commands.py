"""The commands of azu-dht: join, ask, and print a table for people or a document for programs."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import click
import trio

from azu.config import DhtSettings
from azu.dht import answers, lookups, names, tracing
from azu.dht.coverage import models_of
from azu.dht.models import LEGEND, models_document, no_model, show_models
from azu.dht.peers import nobody, peers_document, show_peers, summary, way_in
from azu.dht.record import record_fields, record_title, records_document
from azu.dht.screen import is_roomy, open_console, show_card, show_rows
from azu.dht.snapshot import Pong
from azu.dht.survey import survey
from azu.dht.visit import entrances, visit
from azu.errors import NetworkError

__all__ = ["find", "get", "models", "peers", "ping", "providers", "trace"]


async def peers(settings: DhtSettings, *, wide: bool) -> None:
    """`azu-dht peers`."""
    snapshot = await survey(settings, with_rtt=True)
    if settings.as_json:
        _print_json(peers_document(snapshot))
    elif snapshot.is_empty:
        click.echo(nobody(snapshot, way_in(settings)))
    else:
        console = open_console()
        show_peers(console, snapshot, wide=wide)
        click.echo(summary(snapshot))


async def models(settings: DhtSettings, *, wide: bool) -> None:
    """`azu-dht models`."""
    snapshot = await survey(settings, with_rtt=False)
    if settings.as_json:
        _print_json(models_document(snapshot))
    elif snapshot.is_empty:
        click.echo(nobody(snapshot, way_in(settings)))
    elif not models_of(snapshot):
        click.echo(no_model(way_in(settings)))
    else:
        show_models(open_console(), snapshot, wide=wide)
        click.echo(f"{LEGEND}\n{summary(snapshot)}")


async def get(settings: DhtSettings, key: str) -> None:
    """`azu-dht get`."""
    async with visit(settings) as overlay:
        found = await lookups.get(overlay, key)
    now = time.time()
    if settings.as_json:
        _print_json(records_document(found, now))
        return
    console = open_console()
    for each in found:
        show_card(console, record_title(each), record_fields(each, now))


async def providers(settings: DhtSettings, model: str, *, wide: bool) -> None:
    """`azu-dht providers`."""
    async with visit(settings) as overlay:
        digest = await lookups.digest_of(overlay, model)
        found = await lookups.providers(overlay, digest)
    if settings.as_json:
        _print_json(answers.providers_document(found, digest))
    else:
        console = open_console()
        rows = answers.provider_rows(found, digest, time.time(), wide=wide or is_roomy(console))
        show_rows(console, rows, optional=())
        click.echo(f"manifest {digest}")


async def find(settings: DhtSettings, peer: str) -> None:
    """`azu-dht find`."""
    async with visit(settings) as overlay:
        peer_id = await lookups.peer_of(overlay, peer)
        found = await lookups.find(overlay, peer_id)
    if settings.as_json:
        _print_json(answers.addresses_document(peer_id, found))
    else:
        show_rows(open_console(), answers.address_rows(found), optional=())


async def ping(settings: DhtSettings, peer: str, *, count: int) -> None:
    """`azu-dht ping`: a line as each answer comes."""

    def tell(number: int, pong: Pong | None) -> None:
        if not settings.as_json:
            click.echo(answers.ping_line(number, pong))

    async with visit(settings) as overlay:
        pings = await lookups.ping_peer(overlay, await lookups.peer_of(overlay, peer), count, tell)
    if settings.as_json:
        _print_json(answers.pings_document(pings))
    else:
        click.echo(answers.ping_summary(pings))
    if not any(pings.pongs):
        raise NetworkError(
            f"{pings.peer_id} took the connection, and answered no ping",
            code="no_answer",
            remedy="It hangs or is overloaded: look at its log",
        )


async def trace(settings: DhtSettings, key: str, *, as_member: bool, wide: bool) -> None:
    """`azu-dht trace`."""
    is_whole = names.is_whole(key)  # which refuses what can be none, before anybody is connected to
    async with visit(settings) as overlay:
        whole = key if is_whole else await lookups.whole_key(overlay, key)
        seeds = None if as_member else entrances(overlay, settings)
        started = trio.current_time()
        found = await overlay.trace(names.raw_key(whole), seeds=seeds)
        seconds = trio.current_time() - started
    if settings.as_json:
        _print_json(tracing.trace_document(found, whole, seconds))
        return
    console = open_console()
    wide = wide or is_roomy(console)
    show_rows(console, tracing.trace_rows(found, wide=wide), optional=("NAMED BY",))
    click.echo(tracing.trace_summary(found, seconds, wide=wide))


def _print_json(document: dict[str, Any]) -> None:
    """One document on stdout. It is ASCII, so that control characters in strangers' text stay escaped."""
    text = json.dumps(document, indent=2)
    click.echo(re.sub(r"\[\n[\d,\s]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text))  # on one line
