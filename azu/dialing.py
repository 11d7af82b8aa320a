"""Reaching a worker by its peer id alone: its signed record in the DHT says where it listens."""

from __future__ import annotations

from azu.errors import InputError
from azu.overlay import Overlay, OverlayStream, parse_peer_multiaddr
from azu.records import open_worker_record, worker_key

__all__ = ["open_worker_stream"]


async def open_worker_stream(overlay: Overlay, peer_id: str, protocol: str) -> OverlayStream:
    """A stream to a worker, dialled at the addresses in its record where there is no connection yet.

    Raises:
        NetworkError: the worker cannot be found or reached.
    """
    addrs: tuple[str, ...] = ()
    if not overlay.is_connected(peer_id):
        value = await overlay.get_record(worker_key(peer_id))
        claimed = open_worker_record(value).addrs if value is not None else ()
        addrs = tuple(address for address in claimed if _can_dial(address, peer_id))
    return await overlay.open_stream(peer_id, protocol, addrs=addrs)


def _can_dial(address: str, peer_id: str) -> bool:
    """Whether an address out of a worker's record is one; the worker could write anything there."""
    try:
        return parse_peer_multiaddr(address).peer_id == peer_id
    except InputError:
        return False
