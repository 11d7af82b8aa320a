"""The router that this machine sends everything to that is not in its own network."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from azu.errors import NetworkError, ProtocolError

__all__ = ["Gateway", "external_address", "find_gateway"]

# Linux: a heading, then interface, destination, gateway, flags, -, -, metric, mask. A thread may be in a namespace.
_ROUTES = Path("/proc/thread-self/net/route")
_RTF_GATEWAY = 0x2


@dataclass(frozen=True, slots=True)
class Gateway:
    """address: the router's in our network; own: ours there."""

    address: IPv4Address
    own: IPv4Address


def find_gateway() -> Gateway:
    """The default gateway over IPv4.

    Raises:
        NetworkError: there is none, or this system does not tell.
    """
    try:
        routes = [line.split() for line in _ROUTES.read_text().splitlines()[1:]]
        defaults = [each for each in routes if each[1] == each[7] == "00000000" and int(each[3], 16) & _RTF_GATEWAY]
        route = min(defaults, key=lambda each: int(each[6]), default=None)
        if route is None:
            raise NetworkError("this machine has no default gateway")
        address = IPv4Address(bytes.fromhex(route[2])[::-1])  # printed as the little-endian number that it is not
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))  # sends nothing; asks the kernel for our address on that way
            return Gateway(address, IPv4Address(probe.getsockname()[0]))
    except OSError as error:
        raise NetworkError(f"the default gateway cannot be found: {error.strerror}") from error


def external_address(told: bytes | str) -> str:
    """A public IPv4 address that a router claims to have.

    Raises:
        ProtocolError: it is no address. NetworkError: one that nobody can connect to from outside.
    """
    try:
        address = ipaddress.IPv4Address(told)
    except ValueError as error:
        raise ProtocolError("the router tells no IPv4 address of its own", code="bad_router") from error
    if not address.is_global or address.is_multicast:
        raise NetworkError(f"the router has no public address itself but {address}: it is behind another NAT")
    return str(address)
