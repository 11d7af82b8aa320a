"""Questions about one peer, one record or one model, put to a swarm that has been joined."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from azu.dht.kinds import KINDS, Kind, Standing, standing
from azu.dht.names import as_digest, is_peer_id, match_model, match_peer, split_key
from azu.dht.snapshot import Pong
from azu.dht.survey import LOOKUP_SECONDS, coordinators, dialable, ping, ping_all
from azu.errors import AzuError, NetworkError
from azu.overlay import Overlay
from azu.records import Record

__all__ = [
    "Address",
    "Found",
    "Pings",
    "Provider",
    "digest_of",
    "find",
    "get",
    "peer_of",
    "ping_peer",
    "providers",
    "whole_key",
]

PARALLEL_PROVIDERS = 16  # of whom the records are asked for at once
MAX_PROVIDERS = 1_000  # of one model; what a hostile DHT server can make us look for
PING_SECONDS = 5.0
PAUSE_SECONDS = 0.5  # between two pings


@dataclass(frozen=True, slots=True)
class Found:
    """A record whose signature holds. answers: whether its peer can be reached; None where that was not tried."""

    key: str
    kind: str
    record: Record
    standing: Standing
    answers: bool | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that announced a model. records: what it says of itself, which may be nothing, or out of force."""

    peer_id: str
    records: tuple[Found, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """A multiaddr of a peer. in_record, in_network: whether the peer's signed record has it, and whether others do."""

    text: str
    in_record: bool
    in_network: bool


@dataclass(frozen=True, slots=True)
class Pings:
    """What became of pinging a peer. pongs: None for each that was lost.

    connect_seconds: what finding and dialling it took; None where joining the swarm had connected us already.
    """

    peer_id: str
    connect_seconds: float | None
    pongs: tuple[Pong | None, ...]


async def peer_of(overlay: Overlay, text: str) -> str:
    """The whole peer id that an operator means: given whole, or by its end among those that are announced.

    Raises:
        InputError: it names no peer, or several.
    """
    if is_peer_id(text):
        return text
    return match_peer(text, {*overlay.connected_peers(), *await _announced(overlay)})


async def digest_of(overlay: Overlay, text: str) -> str:
    """The manifest's digest that an operator means: given whole, by its beginning, or by the model's id.

    Raises:
        InputError: it names no model, or several.
    """
    return as_digest(text) or match_model(text, await coordinators(overlay))


async def get(overlay: Overlay, text: str) -> tuple[Found, ...]:
    """The records under a key, or all of a peer's; the peers of those that are out of force are pinged.

    Raises:
        InputError: it is no key and no peer. NetworkError: there is no record; it says what may be the matter.
    """
    namespace, peer = split_key(text) if text.startswith("/") else (None, text)
    peer_id = await peer_of(overlay, peer)
    found = await _records(overlay, peer_id)
    wanted = [each for each in found if namespace is None or each.key.startswith(f"/{namespace}/")]
    if not wanted:
        raise await _no_record(overlay, peer_id, [each.kind for each in found])
    stale = [each.record for each in wanted if each.standing != "live"]
    answered = await ping_all(overlay, stale)
    return tuple(replace(each, answers=peer_id in answered) if each.standing != "live" else each for each in wanted)


async def whole_key(overlay: Overlay, text: str) -> str:
    """What can be traced, with a peer's ending made whole: a record's key, a digest, or a peer id.

    Raises:
        InputError: it is none of them.
    """
    if text.startswith("/"):
        namespace, peer = split_key(text)
        return f"/{namespace}/{await peer_of(overlay, peer)}"
    return as_digest(text) or await peer_of(overlay, text)


async def providers(overlay: Overlay, digest: str) -> tuple[Provider, ...]:
    """Who announced a model's manifest, with what each says of itself.

    Raises:
        NetworkError: nobody did.
    """
    limit = trio.CapacityLimiter(PARALLEL_PROVIDERS)
    found: list[Provider] = []

    async def ask(peer_id: str) -> None:
        async with limit:
            records = await _records(overlay, peer_id)
            addresses = [address for each in records for address in dialable(each.record)]
            found.append(Provider(peer_id, records, tuple(dict.fromkeys(addresses))))

    peers = await overlay.providers(bytes.fromhex(digest), all_holders=True, timeout=LOOKUP_SECONDS)
    if not peers:
        raise NetworkError(
            f"nobody here has announced the manifest {digest}",
            code="no_provider",
            remedy="Look at `azu-dht models`. A coordinator announces its models within seconds of its start, and each "
            "worker those of which it has layers",
        )
    await _all(partial(ask, peer_id) for peer_id in peers[:MAX_PROVIDERS])
    return tuple(sorted(found, key=lambda each: each.peer_id))


async def find(overlay: Overlay, peer_id: str) -> tuple[Address, ...]:
    """The addresses of a peer: those that it signed, and those that other peers have of it.

    Raises:
        NetworkError: nobody knows one.
    """
    signed = {address for each in await _records(overlay, peer_id) for address in dialable(each.record)}
    known = set(await overlay.find_peer(peer_id))
    if not signed | known:
        raise _unknown(peer_id)
    return tuple(Address(text, text in signed, text in known) for text in sorted(signed | known))


async def ping_peer(overlay: Overlay, peer_id: str, count: int, tell: Callable[[int, Pong | None], None]) -> Pings:
    """Connect to a peer and ping it `count` times; `tell` is told the number of each ping, and its answer or None.

    Raises:
        NetworkError: its addresses are not known, or none of them answers.
    """
    seconds = None if overlay.is_connected(peer_id) else await _connect(overlay, peer_id)
    pongs: list[Pong | None] = []
    for number in range(1, count + 1):
        if pongs:
            await trio.sleep(PAUSE_SECONDS)
        pong = None
        with trio.move_on_after(PING_SECONDS), contextlib.suppress(NetworkError):  # either is a lost ping
            pong = await ping(overlay, peer_id)
        pongs.append(pong)
        tell(number, pong)
    return Pings(peer_id, seconds, tuple(pongs))


async def _connect(overlay: Overlay, peer_id: str) -> float:
    """The seconds that finding and dialling the peer took."""
    started = trio.current_time()
    addresses = [each.text for each in await find(overlay, peer_id)]
    try:
        await overlay.connect(peer_id, addresses)
    except NetworkError as error:
        why = error.message.removeprefix(f"cannot reach {peer_id}: ")
        raise NetworkError(
            f"{peer_id} is known, but does not answer at {', '.join(addresses)} ({why})",
            code=error.code if error.code == "wrong_peer" else "no_answer",
            remedy="It is off or restarting, or a firewall or NAT is between it and this machine and no relay helps; "
            "its record expires 60 s after its last sign of life",
        ) from error
    return trio.current_time() - started


async def _announced(overlay: Overlay) -> set[str]:
    """All peers that announced themselves as workers or coordinators in the last two days."""
    peers: set[str] = set()

    async def ask(key: bytes) -> None:
        peers.update(await overlay.providers(key, all_holders=True, timeout=LOOKUP_SECONDS))

    await _all(partial(ask, kind.meeting_key) for kind in KINDS)
    return peers


async def _records(overlay: Overlay, peer_id: str) -> tuple[Found, ...]:
    """A peer's records of every kind; those that cannot be had or read are left out."""
    found: list[Found] = []

    async def ask(kind: Kind[Record]) -> None:
        key = kind.key(peer_id)
        try:
            value = await overlay.get_record(key, timeout=LOOKUP_SECONDS)
            record = None if value is None else kind.read(value)
        except AzuError:
            return
        if record is not None:
            found.append(Found(key, kind.name, record, standing(record, time.time())))

    await _all(partial(ask, kind) for kind in KINDS)
    return tuple(sorted(found, key=lambda each: each.key))


async def _no_record(overlay: Overlay, peer_id: str, kinds: Sequence[str]) -> NetworkError:
    """What the matter may be where a peer has no record of the kind wanted, only of these."""
    if kinds:
        return NetworkError(
            f"{peer_id} has no such record: it is a {' and a '.join(kinds)}",
            code="no_record",
            remedy=f"Run `azu-dht get {peer_id}` for what there is",
        )
    if peer_id in await _announced(overlay):
        return NetworkError(
            f"{peer_id} announced itself, but nobody has a record of it that is in force",
            code="no_record",
            remedy="It just started (try again in a few seconds), or it is gone: announcements outlive their peers by "
            "up to 48 hours",
        )
    if overlay.is_connected(peer_id) or await overlay.find_peer(peer_id):
        return NetworkError(
            f"{peer_id} is known here, but neither as a worker nor as a coordinator: bootstrap nodes have no record",
            code="no_record",
            remedy=f"Run `azu-dht find {peer_id}` for its addresses, and `azu-dht peers` for workers and coordinators",
        )
    return _unknown(peer_id)


def _unknown(peer_id: str) -> NetworkError:
    return NetworkError(
        f"nobody in this swarm knows {peer_id}",
        code="unknown_peer",
        remedy="Check the peer id, and that it joined this swarm and not another one (`azu-dht peers` lists those "
        "that are here)",
    )


async def _all(questions: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Ask them at the same time; the first error comes out as it is, and not in a group."""
    failed: list[AzuError] = []

    async def ask(question: Callable[[], Awaitable[None]]) -> None:
        try:
            await question()
        except AzuError as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        for question in questions:
            nursery.start_soon(ask, question)
    if failed:
        raise failed[0]
