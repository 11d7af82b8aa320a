"""Telling a worker's owner why it has nothing to do: no coordinator, too little memory, or not its turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import trio

from azu.errors import NetworkError
from azu.logs import log
from azu.overlay import Overlay
from azu.records import COORDINATORS_KEY, CoordinatorRecord, coordinator_key, is_live, open_coordinator_record
from azu.sizes import format_size
from azu.wire.tensors import WeightFormat

__all__ = ["explain_idleness", "why_idle"]

logger = logging.getLogger(__name__)

# A worker that is needed is assigned layers within a second or two of joining.
_PATIENCE_S = 5.0
# Idle workers of a large swarm all look up all coordinators, and where there is none that asks a score of peers each
# time: while the reason stays the same they do so less and less often.
_AGAIN_S, _LAST_AGAIN_S = 30.0, 480.0


async def explain_idleness(overlay: Overlay, *, vram: int, dtype: WeightFormat, is_busy: Callable[[], bool]) -> None:
    """Log why the worker is idle for as long as it is, when the reason changes; runs until cancelled."""
    told = ""
    pause = _PATIENCE_S
    while True:
        await trio.sleep(pause)
        if is_busy() or not overlay.connected_peers():
            told, pause = "", _PATIENCE_S
            continue
        level, reason = why_idle(await _coordinators(overlay), vram=vram, dtype=dtype)
        if reason == told:
            pause = min(max(2 * pause, _AGAIN_S), _LAST_AGAIN_S)
            continue
        pause = _AGAIN_S if level >= logging.WARNING else _PATIENCE_S
        log(logger, level, reason)
        told = reason


def why_idle(coordinators: Sequence[CoordinatorRecord], *, vram: int, dtype: WeightFormat) -> tuple[int, str]:
    """The log level and the sentence for a worker with `vram` bytes to which nothing is assigned. Pure."""
    least = {offer.model_id: offer.least_bytes.get(dtype, 0) for record in coordinators for offer in record.models}
    if not least:
        return logging.WARNING, "idle: no coordinator was found in this swarm; waiting for one"
    if vram < min(least.values()):
        needs = ", ".join(f"{model_id} {format_size(size)}" for model_id, size in sorted(least.items()))
        return logging.ERROR, (
            f"idle: {format_size(vram)} are too little for a single layer ({needs}); offer more with --vram"
        )
    return logging.INFO, (
        f"idle: waiting for layers of {', '.join(sorted(least))}; they are given out once the swarm's workers together "
        "have memory for all of them, and to spare workers when one leaves (azu-dht models shows what is missing)"
    )


async def _coordinators(overlay: Overlay) -> list[CoordinatorRecord]:
    records: list[CoordinatorRecord] = []
    try:
        for peer_id in await overlay.providers(COORDINATORS_KEY):
            value = await overlay.get_record(coordinator_key(peer_id))
            record = open_coordinator_record(value) if value is not None else None
            if record is not None and is_live(record, time.time()):
                records.append(record)
    except NetworkError as error:
        log(logger, logging.DEBUG, "coordinators not found", reason=error.message)
    return records
