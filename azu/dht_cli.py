"""The azu-dht program."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from azu.cli import program, run_program, settings_options
from azu.config import DhtSettings
from azu.swarm_key import read_swarm_key

if TYPE_CHECKING:
    from azu.dht.snapshot import Snapshot

__all__ = ["main"]

_WIDE = "Shorten nothing: whole peer ids, digests, names and every address. So do terminals of 200 columns, and --json."


@program(
    "azu-dht",
    examples=[
        "azu-dht peers --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...",
        "export AZU_BOOTSTRAP=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...   # then it need not be typed again",
        "azu-dht models",
        "azu-dht peers --wide | less -S",
        "azu-dht models --json | jq '.models[] | select(.complete | not) | {model_id, missing}'",
    ],
)
def main() -> None:
    """Look into a swarm's DHT: who is there, and which layers of which models they hold.

    Needs one address of the swarm, and changes nothing there. Everything shown is what the peers sign about themselves:
    a signature says who claims it, not that it is true.
    """


@main.command()
@click.option("--wide", is_flag=True, help=_WIDE)
@settings_options(DhtSettings)
def peers(settings: DhtSettings, wide: bool) -> None:
    """List the workers and coordinators of a swarm.

    LAYERS are numbered from 0, both ends included. MS/LAYER is the time that a token takes in one layer, as the worker
    measured it. AGE is the record's: workers renew theirs every few seconds, and records that have expired are left
    out. RTT is measured from here, - where a peer did not answer within two seconds.
    """
    snapshot = _survey(settings, with_rtt=True)
    if settings.as_json:
        from azu.dht.peers import peers_document

        _print_json(peers_document(snapshot))
    else:
        _show_peers(snapshot, settings, wide)


@main.command()
@click.option("--wide", is_flag=True, help=_WIDE)
@settings_options(DhtSettings)
def models(settings: DhtSettings, wide: bool) -> None:
    """Show how well the workers of a swarm cover each model.

    A model answers when every layer of it is loaded by at least one worker. WORKERS counts each worker once, in its
    best state: loaded (ready to run), loading (on its way into memory) or cached (on its disk).

    In --json, ranges are {"start": 0, "end": 12}: layers 0 to 11.
    """
    snapshot = _survey(settings, with_rtt=False)
    if settings.as_json:
        from azu.dht.models import models_document

        _print_json(models_document(snapshot))
    else:
        _show_models(snapshot, settings, wide)


def _survey(settings: DhtSettings, *, with_rtt: bool) -> Snapshot:
    from azu.dht.survey import survey  # libp2p loads here, so that --help is fast

    key = read_swarm_key(settings.swarm_key)
    return run_program(partial(survey, settings.bootstrap, with_rtt=with_rtt, swarm_key=key), settings=settings)


def _show_peers(snapshot: Snapshot, settings: DhtSettings, wide: bool) -> None:
    from azu.dht.peers import peer_rows, summary
    from azu.dht.screen import ROOMY, open_console, show_rows

    _never_fail_on_encoding()
    console = open_console()
    if snapshot.is_empty:
        click.echo(_nobody(snapshot, settings))
        return
    is_roomy = console.is_terminal and console.width >= ROOMY
    show_rows(console, peer_rows(snapshot, wide=wide or is_roomy), optional=("AGENT", "ADDRESSES"))
    click.echo(summary(snapshot))


def _show_models(snapshot: Snapshot, settings: DhtSettings, wide: bool) -> None:
    from azu.dht.coverage import models_of
    from azu.dht.models import LEGEND, model_fields, model_title
    from azu.dht.peers import summary
    from azu.dht.screen import ROOMY, open_console, show_card

    _never_fail_on_encoding()
    console = open_console()
    views = models_of(snapshot)
    if not views:
        click.echo(_nobody(snapshot, settings) if snapshot.is_empty else _no_model(settings))
        return
    wide = wide or (console.is_terminal and console.width >= ROOMY)
    for view in views:
        fields = model_fields(view, width=console.width - 14, wide=wide)
        show_card(console, model_title(view, wide=wide), fields)
    click.echo(f"{LEGEND}\n{summary(snapshot)}")


def _nobody(snapshot: Snapshot, settings: DhtSettings) -> str:
    address = settings.bootstrap[0]
    lines = [
        "This swarm has no workers and no coordinators right now.",
        f"  to add a worker:       azu-node join {address}",
        f"  to add a coordinator:  azu-coordinator serve --bootstrap {address} --model PATH_OR_HUB_ID",
    ]
    if snapshot.expired:
        lines.append(
            f"  Expired records left out: {snapshot.expired}. Those peers are gone, or the clock here is wrong."
        )
    if snapshot.silent:
        lines.append(f"  Announced without a record: {snapshot.silent}. They are just starting, or gone.")
    return "\n".join(lines)


def _no_model(settings: DhtSettings) -> str:
    return (
        "No coordinator here offers a model, and no worker holds layers of one.\n"
        f"  to offer one:  azu-coordinator serve --bootstrap {settings.bootstrap[0]} --model PATH_OR_HUB_ID"
    )


def _print_json(document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2)  # ASCII: control characters in strangers' text stay escaped
    click.echo(re.sub(r"\[\n[\d,\s]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text))  # on one line


def _never_fail_on_encoding() -> None:
    """A terminal that cannot show a character gets its escape instead of an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
