"""May strangers connect to us? Peers find out by trying (AutoNAT v1).

https://github.com/libp2p/specs/blob/master/autonat/autonat-v1.md. A server dials only the address that it sees the
asker at, so that nobody can point it at somebody else, and seldom.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from multiaddr import Multiaddr

from azu.errors import NetworkError, ProtocolError
from azu.overlay.addresses import line_of, parse_peer_id
from azu.overlay.faults import mapped
from azu.overlay.nat.dialing import DirectDials
from azu.overlay.nat.messages import decode_addresses, encode_addresses, read_message, write_message
from azu.overlay.streams import OverlayStream

if TYPE_CHECKING:
    from azu.overlay.host import Overlay

__all__ = ["AUTONAT", "AutoNatServer", "may_connect"]

logger = logging.getLogger(__name__)

AUTONAT = "/libp2p/autonat/1.0.0"
_MESSAGE_SECONDS = 10.0
_DIAL_SECONDS = 5.0
_PER_MINUTE, _PER_LINE = 60, 4  # questions that are answered by dialling back, in all and of one line


class AutoNatServer:
    """Serves AUTONAT with `handle`."""

    def __init__(self, dials: DirectDials) -> None:
        self._dials = dials
        self._dialled: deque[tuple[float, str]] = deque()

    async def handle(self, stream: OverlayStream) -> None:
        """Answer one peer that asks whether its addresses can be dialled."""
        with mapped(f"read what {stream.peer_id} asks"), trio.fail_after(_MESSAGE_SECONDS):
            request = await read_message(stream, Message)
        if request.type != Message.DIAL or request.dial.peer.id != parse_peer_id(stream.peer_id).to_bytes():
            raise ProtocolError("a question about somebody else", code="bad_message")
        answer = Message(type=Message.DIAL_RESPONSE)
        addresses = [
            each
            for each in decode_addresses(request.dial.peer.addrs)
            if each.split("/")[2] == stream.remote_ip and not stream.is_relayed
        ]
        if not addresses or not self._may_dial(line_of(stream.remote_ip)):
            answer.dialResponse.status = Message.E_DIAL_REFUSED
        elif (found := await self._dial_any(stream.peer_id, addresses)) is not None:
            answer.dialResponse.status = Message.OK
            answer.dialResponse.addr = Multiaddr(found).to_bytes()
        else:
            answer.dialResponse.status = Message.E_DIAL_ERROR
        await write_message(stream, answer)

    def _may_dial(self, line: str) -> bool:
        now = trio.current_time()
        while self._dialled and self._dialled[0][0] < now - 60:
            self._dialled.popleft()
        if len(self._dialled) >= _PER_MINUTE or sum(each == line for _, each in self._dialled) >= _PER_LINE:
            return False
        self._dialled.append((now, line))
        return True

    async def _dial_any(self, peer_id: str, addresses: list[str]) -> str | None:
        """The first address at which a new connection proves to be the peer's."""
        found: list[str] = []

        async def attempt(address: str) -> None:
            if await self._dials.answers(peer_id, address):
                found.append(address)
                nursery.cancel_scope.cancel()

        with trio.move_on_after(_DIAL_SECONDS):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(attempt, address)
        return found[0] if found else None


async def may_connect(overlay: Overlay, server: str, addresses: list[str]) -> str | None:
    """Ask a server to dial back: the address that it reached us at, or None if it reached none.

    Raises:
        NetworkError: it does not say. ProtocolError: its answer is malformed.
    """
    with trio.fail_after(_MESSAGE_SECONDS + _DIAL_SECONDS):
        async with await overlay.open_stream(server, AUTONAT) as stream:
            question = Message(type=Message.DIAL)
            question.dial.peer.id = parse_peer_id(overlay.peer_id).to_bytes()
            question.dial.peer.addrs.extend(encode_addresses(addresses))
            await write_message(stream, question)
            answer = await read_message(stream, Message)
    status = answer.dialResponse.status
    if answer.type != Message.DIAL_RESPONSE or status not in (Message.OK, Message.E_DIAL_ERROR):
        raise NetworkError(f"{server} does not say whether we can be reached")
    reached = decode_addresses([answer.dialResponse.addr]) if status == Message.OK else []
    return next((each for each in reached if each in addresses), None)
