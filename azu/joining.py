"""Getting into the swarm and staying in it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import trio

from azu.config import BootstrapSettings, MemberSettings
from azu.errors import NetworkError
from azu.identity import Identity
from azu.logs import log
from azu.overlay import Overlay, OverlayConfig, RelayLimits
from azu.peerbook import PeerBook
from azu.records import VALIDATORS
from azu.swarm_key import read_swarm_key

__all__ = ["overlay_config", "stay_joined"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_CHECK_S = 5.0
_NOTE_S = 30.0  # how often the peers met are written down, after the first time
_FEW = 3  # with fewer peers than these, bootstrap nodes are dialled now and then, or a swarm once split stays so
_REJOIN_S = 60.0
_SAMPLE = 8  # remembered peers that are dialled at once


def overlay_config(
    settings: MemberSettings | BootstrapSettings, identity: Identity, agent: str, *, relay: RelayLimits | None = None
) -> OverlayConfig:
    """What a node's overlay is opened with.

    Raises:
        InputError: the file of the swarm's key cannot be read, or has none.
    """
    return OverlayConfig(
        seed=identity.seed,
        listen=settings.listen,
        agent=agent,
        validators=VALIDATORS,
        swarm_key=read_swarm_key(settings.swarm_key),
        relay=relay,
        announce=settings.announce,
        port_mapping=settings.port_mapping,
    )


async def stay_joined(
    overlay: Overlay,
    bootstrap: Sequence[str],
    *,
    book: PeerBook | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Dial the bootstrap nodes, and again whenever no peer is left; reports started when first joined.

    Where none of them answers, remembered peers are tried. Nodes that are down are tried again with growing pauses,
    for ever, and the log says so: home machines start before their router does.

    Args:
        book: the peers remembered, to which those met are added.

    Raises:
        InputError: a multiaddr is malformed.
    """
    pause = _FIRST_RETRY_S
    joined = False
    retried_at = trio.current_time()
    noted_at = -_NOTE_S
    while True:
        # Before the first join a connection is no sign of it: a peer may have dialled us.
        if joined and overlay.connected_peers():
            if book is not None and trio.current_time() >= noted_at + _NOTE_S:
                noted_at = trio.current_time()
                book.note(overlay.servers())
            if len(overlay.connected_peers()) < _FEW and trio.current_time() >= retried_at + _REJOIN_S:
                retried_at = trio.current_time()
                await _dial_quietly(overlay, bootstrap)
            await trio.sleep(_CHECK_S)
            continue
        try:
            peers = await _join(overlay, bootstrap, book)
        except NetworkError as error:
            # A random part, so that a swarm that lost its bootstrap node does not come back in one burst.
            wait = pause * random.uniform(0.75, 1.25)  # noqa: S311 - not a secret
            log(logger, logging.WARNING, "cannot join yet", reason=error.message, retry_in_s=round(wait, 1))
            await trio.sleep(wait)
            pause = min(pause * 2, _LAST_RETRY_S)
            continue
        pause = _FIRST_RETRY_S
        log(logger, logging.INFO, "joined the swarm", through=peers)
        if not joined:
            joined = True
            task_status.started()
        # Without this, a swarm whose only bootstrap node is this one would be joined for ever and ever.
        await trio.sleep(_CHECK_S)


async def _join(overlay: Overlay, bootstrap: Sequence[str], book: PeerBook | None) -> list[str]:
    """Peer ids reached: of bootstrap nodes, or else of remembered peers."""
    try:
        reached = await overlay.bootstrap(bootstrap)
        if reached or not book:
            return reached
    except NetworkError as error:
        if not book:
            raise
        log(logger, logging.INFO, "trying remembered peers", remembered=len(book), reason=error.message)
    return await overlay.bootstrap(book.sample(_SAMPLE))


async def _dial_quietly(overlay: Overlay, bootstrap: Sequence[str]) -> None:
    try:
        await overlay.bootstrap(bootstrap)
    except NetworkError as error:
        log(logger, logging.DEBUG, "few peers, and no bootstrap node answers", reason=error.message)
