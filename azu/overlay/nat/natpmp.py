"""NAT-PMP: a port mapping by two small datagrams (RFC 6886).

Servers of its successor PCP (RFC 6887) are required to know it too, by that RFC's appendix A at least to say what they
speak; those in home routers answer both.
"""

from __future__ import annotations

import struct

import trio

from azu.errors import NetworkError, ProtocolError
from azu.overlay.nat.gateway import Gateway, external_address

__all__ = ["NatPmp"]

PORT = 5351
_TRIES = (
    0.25,
    0.5,
    1.0,
)  # seconds to wait for an answer; the RFC goes on to 64 s, which is for those with no other way
_ADDRESS, _MAP_TCP, _ANSWER = 0, 2, 128
_RESULTS = {1: "unsupported version", 2: "not authorised", 3: "network failure", 4: "out of resources"}
_HEAD = struct.Struct(">BBHI")  # version, operation, result, seconds since the router's epoch
_REQUEST = struct.Struct(">BBHHHI")  # version, operation, -, our port, wanted port, lifetime in seconds
_MAPPED = struct.Struct(">HHI")  # our port, the router's, lifetime in seconds


class NatPmp:
    """A router asked by NAT-PMP; whether it understands shows in its first answer."""

    name = "NAT-PMP"

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def external_address(self) -> str:
        """The router's public IPv4 address.

        Raises:
            NetworkError: no answer, a refusal, or an address that is not public. ProtocolError: a malformed answer.
        """
        return external_address(await self._ask(bytes((0, _ADDRESS)), _ADDRESS, 4))

    async def add(self, port: int, wanted: int, lifetime: int) -> tuple[int, int]:
        """Lead a TCP port of the router here; which port it is, and for how many seconds.

        Raises:
            NetworkError: no answer, or a refusal. ProtocolError: a malformed answer.
        """
        request = _REQUEST.pack(0, _MAP_TCP, 0, port, wanted, lifetime)
        ours, external, granted = _MAPPED.unpack(await self._ask(request, _MAP_TCP, _MAPPED.size))
        if ours != port or (lifetime and not (external and granted)):
            raise ProtocolError("the router answers about another mapping", code="bad_router")
        return external, granted

    async def remove(self, port: int, external: int) -> None:
        """Take it away. Raises as `add`."""
        await self.add(port, 0, 0)

    async def _ask(self, request: bytes, operation: int, size: int) -> bytes:
        """The answer's body of `size` bytes. The socket is connected, so that only the router can answer."""
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
            try:
                await udp.connect((str(self._gateway.address), PORT))
                for seconds in _TRIES:
                    await udp.send(request)
                    with trio.move_on_after(seconds):
                        return _opened(await udp.recv(64), operation, size)
            except OSError as error:
                raise NetworkError(f"the router takes no NAT-PMP: {error.strerror}") from error
        raise NetworkError("the router does not answer NAT-PMP")


def _opened(answer: bytes, operation: int, size: int) -> bytes:
    if len(answer) < _HEAD.size:
        raise ProtocolError("the router's NAT-PMP answer is cut off", code="bad_router")
    version, answered, result, _ = _HEAD.unpack_from(answer)
    if result:
        raise NetworkError(f"the router refuses NAT-PMP: {_RESULTS.get(result, f'result {result}')}")
    if version != 0 or answered != operation + _ANSWER or len(answer) != _HEAD.size + size:
        raise ProtocolError("the router's NAT-PMP answer is malformed", code="bad_router")
    return answer[_HEAD.size :]
