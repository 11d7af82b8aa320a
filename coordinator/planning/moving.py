"""Whether a stage that changes its worker is better off with the old one's KV cache, or computes its own. Pure.

Its own: it takes the hidden states of all positions from the stage before it, and runs them through its layers as a
prompt. Both go on at the same time, so the slower of the two counts. Keys and values of a position take more bytes than
its hidden states, and no computing.
"""

from __future__ import annotations

from collections.abc import Callable

from azu.models.manifest import Manifest
from azu.planning import links_of, views_for
from azu.records import WorkerRecord
from azu.tickets import JobTicket
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE

__all__ = ["cache_seconds"]


def cache_seconds(
    manifest: Manifest,
    record_of: Callable[[str], WorkerRecord | None],
    ticket: JobTicket,
    index: int,
    heir: str,
    positions: int,
) -> float | None:
    """Seconds until the KV cache of so many positions of this stage is at its heir, where that is faster than to have
    the heir compute it, by what the workers have measured; else None.

    Only caches that are keys and values of all positions can be sent.
    """
    stage, before = ticket.stages[index], ticket.stages[index - 1]
    caches = manifest.caches[stage.start : stage.end]
    records = [record for peer in {stage.peer_id, before.peer_id, heir} if (record := record_of(peer)) is not None]
    views = {view.peer_id: view for view in views_for(manifest, records)}
    leaver, new = views.get(stage.peer_id), views.get(heir)
    if leaver is None or new is None or any(cache.window or cache.state_bytes for cache in caches):
        return None
    links = links_of(manifest, ticket.dtype, records)
    size = sum(cache.per_token for cache in caches) * ITEMSIZE[ACTIVATIONS[ticket.dtype]]
    sending = links.link(leaver, new).hop_s(positions * size)
    computing = positions * (stage.end - stage.start) * new.prefill_s
    if (
        index and (previous := views.get(before.peer_id)) is not None
    ):  # the first stage gets token ids, which are nothing
        computing = max(computing, links.hop_s(previous, new, positions))
    return sending if new.prefill_s and sending < computing else None
