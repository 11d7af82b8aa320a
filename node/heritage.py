"""A running job's KV cache on its way from a worker that leaves to the one that takes its stage over.

    leaver ──ring stream──► heir    hello, how many positions, and then keys and values, layer by layer

The leaver computes on meanwhile. What it adds then, the stage before it will send again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from azu.channel import Channel
from azu.dialing import open_worker_stream
from azu.errors import ModelError, NetworkError, ProtocolError
from azu.overlay import Overlay
from azu.tickets import JobTicket
from azu.wire.messages import RING, RING_PROTOCOL, Hello, Inheritance, Kept, Message
from node.engine.device import DeviceThread
from node.engine.heritage import Piece, pieces
from node.engine.stage import JobState

__all__ = ["bequeath", "inherit"]

M = TypeVar("M", bound=Message)

# A piece is awaited this long: longer than its writing may take.
_PIECE_S = 30.0


async def bequeath(overlay: Overlay, device: DeviceThread, state: JobState, positions: int, ticket: JobTicket) -> None:
    """Send the cache of a job's first `positions` to the heir.

    Args:
        ticket: names the heir.

    Raises:
        NetworkError: it cannot be reached, or went away. ModelError: this cache cannot be handed over.
        InternalError: the device cannot read it.
    """
    index = next(number for number, stage in enumerate(ticket.stages) if stage.heir_of == overlay.peer_id)
    form = await device.run(state.stage.cache_form)
    if form is None:
        raise ModelError("this cache is not keys and values alone", code="bad_heritage")
    async with await open_worker_stream(overlay, ticket.stages[index].peer_id, RING_PROTOCOL) as stream:
        channel = Channel(stream, RING, max_body=0)
        await channel.send(Hello(job_id=ticket.job_id, epoch=ticket.epoch, stage=index))
        await channel.send(Inheritance(positions=positions))
        for piece in pieces(form, positions):
            body = await device.run(partial(state.stage.read_piece, state, piece))
            await channel.send(_header(piece), body)
        await channel.receive()  # it closes the stream when it has read all


async def inherit(
    channel: Channel,
    device: DeviceThread,
    open_job: Callable[[], JobState],
    grow: Callable[[int], Awaitable[None]],
    most: int,
) -> JobState:
    """What comes after the hello from the worker that leaves the stage.

    Args:
        open_job: makes the job's empty state.
        grow: waits for room for so many positions.
        most: positions that may come.

    Raises:
        ProtocolError: it is not a cache of this stage, or too much of one.
        NetworkError: it broke off. InternalError: the device cannot take it.
    """
    message, _ = await _expect(channel, Inheritance)
    if not 0 < message.positions <= most:
        raise ProtocolError(f"{message.positions} positions of KV cache were to come", code="bad_heritage")
    await grow(message.positions)
    state = await device.run(open_job)
    form = await device.run(state.stage.cache_form)
    if form is None:
        raise ProtocolError("this stage's cache is not keys and values alone", code="bad_heritage")
    for piece in pieces(form, message.positions):
        size = form.row_bytes(piece.layer) * piece.rows
        channel.limit_body(size)
        kept, body = await _expect(channel, Kept)
        if kept != _header(piece) or len(body) != size:
            raise ProtocolError("a piece of KV cache came out of turn, or of another size", code="bad_heritage")
        await device.run(partial(state.stage.write_piece, state, form, piece, body))
    state.position = message.positions
    return state


def _header(piece: Piece) -> Kept:
    return Kept(layer=piece.layer, position=piece.position, rows=piece.rows)


async def _expect(channel: Channel, kind: type[M]) -> tuple[M, bytearray]:
    try:
        with trio.fail_after(_PIECE_S):
            return await channel.expect(kind)
    except trio.TooSlowError:
        raise NetworkError(f"{channel.peer_id} sent no KV cache for {_PIECE_S:g} s", code="peer_silent") from None
