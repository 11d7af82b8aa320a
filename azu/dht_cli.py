"""The azu-dht program.

Each command imports what it needs when it runs: libp2p takes a second, which --help shall not.
"""

from __future__ import annotations

from functools import partial

import click

from azu.cli import program, run_program, settings_options
from azu.config import DhtSettings

__all__ = ["main"]

_wide = click.option(
    "--wide",
    is_flag=True,
    help="Shorten nothing: whole peer ids, digests, names and every address. So do terminals of 200 columns, and "
    "--json.",
)


@program(
    "azu-dht",
    examples=[
        "azu-dht peers --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...",
        "export AZU_BOOTSTRAP=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...   # then it need not be typed again",
        "azu-dht models",
        "azu-dht watch",
        "azu-dht get ...kKDvdJpT                      # a peer by the end of its id, as the tables show it",
        "azu-dht providers SmolLM2-135M-Instruct",
        "azu-dht peers --wide | less -S",
        "azu-dht models --json | jq '.models[] | select(.complete | not) | {model_id, missing}'",
    ],
)
def main() -> None:
    """Look into a swarm's DHT: who is there, and which layers of which models they hold.

    Needs one address of the swarm, and changes nothing there. Everything shown is what the peers sign about themselves:
    a signature says who claims it, not that it is true.

    A PEER may be given by its whole id, or by the end of it that the tables show.
    """


@main.command()
@_wide
@settings_options(DhtSettings)
def peers(settings: DhtSettings, wide: bool) -> None:
    """List the workers and coordinators of a swarm.

    LAYERS are numbered from 0, both ends included. MS/LAYER is the time that a token takes in one layer, as the worker
    measured it. AGE is the record's: workers renew theirs every few seconds, and records that have expired are left
    out. RTT is measured from here, - where a peer did not answer within three seconds; PATH is the way that this took:
    direct, or relayed by another peer.
    """
    from azu.dht import commands

    run_program(partial(commands.peers, settings, wide=wide), settings=settings)


@main.command()
@_wide
@settings_options(DhtSettings)
def models(settings: DhtSettings, wide: bool) -> None:
    """Show how well the workers of a swarm cover each model.

    A model answers when every layer of it is loaded by at least one worker. WORKERS counts each worker once, in its
    best state: loaded (ready to run), loading (on its way into memory) or cached (on its disk).

    In --json, ranges are {"start": 0, "end": 12}: layers 0 to 11.
    """
    from azu.dht import commands

    run_program(partial(commands.models, settings, wide=wide), settings=settings)


@main.command()
@click.argument("key")
@settings_options(DhtSettings)
def get(settings: DhtSettings, key: str) -> None:
    """Show a record: whether it is in force, and all that it says.

    KEY is a record's key, /azu-worker/PEER or /azu-coordinator/PEER, or a PEER for all records of it. Only records
    whose signature holds are shown. Where one is out of force, its peer is pinged, to tell a peer that is gone from a
    clock that is wrong.
    """
    from azu.dht import commands

    run_program(partial(commands.get, settings, key), settings=settings)


@main.command()
@click.argument("model")
@_wide
@settings_options(DhtSettings)
def providers(settings: DhtSettings, model: str, wide: bool) -> None:
    """List who announced a model, and which of its layers each has.

    MODEL is the 64 hex digits of its manifest's digest, or the first of them as `azu-dht models` shows them, or its
    id, if a coordinator offers it. Announcements outlive their peers by up to 48 hours: who has no record in force is
    most likely gone.
    """
    from azu.dht import commands

    run_program(partial(commands.providers, settings, model, wide=wide), settings=settings)


@main.command()
@click.argument("peer")
@settings_options(DhtSettings)
def find(settings: DhtSettings, peer: str) -> None:
    """List the addresses of a peer: those in its signed record, and those that other peers have of it.

    PATH is direct, or relayed where the address leads through another peer. None of them is tried: `ping` does that.
    """
    from azu.dht import commands

    run_program(partial(commands.find, settings, peer), settings=settings)


@main.command()
@click.argument("peer")
@click.option("--count", type=click.IntRange(1, 1000), default=4, show_default=True, help="How many pings to send.")
@settings_options(DhtSettings)
def ping(settings: DhtSettings, peer: str, count: int) -> None:
    """Measure round trips to a peer, over a direct connection or a relayed one.

    A ping counts as lost after five seconds.
    """
    from azu.dht import commands

    run_program(partial(commands.ping, settings, peer, count=count), settings=settings)


@main.command()
@click.argument("key")
@click.option(
    "--as-member",
    is_flag=True,
    help="Begin with a full routing table, on several disjoint paths, as workers and coordinators do.",
)
@_wide
@settings_options(DhtSettings)
def trace(settings: DhtSettings, key: str, as_member: bool, wide: bool) -> None:
    """Show how a look-up finds its way, peer by peer.

    KEY is a record's key, /azu-worker/PEER or /azu-coordinator/PEER; a PEER; or a manifest's digest of 64 hex digits.
    The look-up is a newcomer's: it begins at the nodes of --bootstrap.

    Each peer stands below the one that named it. HOP is the order in which they were asked; PATH which of the disjoint
    paths asked; BITS how many leading bits the hash of its id shares with the key's, which grows towards the goal;
    NAMED how many closer peers it named in turn.
    """
    from azu.dht import commands

    run_program(partial(commands.trace, settings, key, as_member=as_member, wide=wide), settings=settings)


@main.command()
@click.option(
    "--interval", type=click.FloatRange(1, 3600), default=5.0, show_default=True, help="Seconds between two refreshes."
)
@settings_options(DhtSettings)
def watch(settings: DhtSettings, interval: float) -> None:
    """Show peers and models on the whole terminal, again and again. q or Ctrl-C ends it.

    With --json it prints one document a line for each refresh, on a terminal or not.
    """
    from azu.dht.watch import watch

    run_program(partial(watch, settings, interval=interval), settings=settings)
