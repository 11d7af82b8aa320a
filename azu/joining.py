"""Getting into the swarm and staying in it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

import trio

from azu.errors import NetworkError
from azu.logs import log
from azu.overlay import Overlay

__all__ = ["stay_joined"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_CHECK_S = 5.0


async def stay_joined(
    overlay: Overlay,
    bootstrap: Sequence[str],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Dial the bootstrap nodes, and again whenever no peer is left; reports started when first joined.

    A bootstrap node that is down is tried again with growing pauses, for ever, and the log says so: home machines
    start before their router does.

    Raises:
        InputError: a multiaddr is malformed.
    """
    pause = _FIRST_RETRY_S
    joined = False
    while True:
        # Before the first join a connection is no sign of it: a peer may have dialled us.
        if joined and overlay.connected_peers():
            await trio.sleep(_CHECK_S)
            continue
        try:
            peers = await overlay.bootstrap(bootstrap)
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
