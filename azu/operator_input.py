"""What an operator types to name a peer, an address or a device: checked early, with a remedy, and without libp2p.

The overlay parses addresses for good. These checks are here so that a typo is told apart at once, before a key is made
or a port opened, and so that the command line starts fast.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from azu.errors import InputError

__all__ = ["check_device", "check_host_port", "check_multiaddr", "check_peer_address", "check_peer_id"]

_LONGEST = 512  # characters; a relayed address with two peer ids and a certificate hash stays below
_PEER_ID = re.compile(r"(?:12D3KooW|Qm)[1-9A-HJ-NP-Za-km-z]{44}")
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
_DEVICE = re.compile(r"auto|cpu|cuda(?::\d{1,3})?")
_EXAMPLE = "/ip4/203.0.113.7/tcp/4001"
_EXAMPLE_PEER = f"{_EXAMPLE}/p2p/12D3KooW..."


def check_device(text: str) -> str:
    """The device's name: auto, cpu, cuda or cuda:N. Whether it exists is found out by torch.

    Raises:
        InputError: any other text.
    """
    if not _DEVICE.fullmatch(text):
        raise InputError(f"{text[:40]!r} is not a device", code="bad_device", remedy="use auto, cpu, cuda or cuda:N")
    return text


def check_host_port(text: str) -> str:
    """An IP address and a port, such as 127.0.0.1:9464 or [::1]:9464.

    Raises:
        InputError: any other text.
    """
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        if not 0 <= int(port) <= 65_535:
            raise ValueError("no port")
    except ValueError as error:
        raise InputError(
            f"{text[:80]!r} is not an address and a port", code="bad_host_port", remedy="write it like 127.0.0.1:9464"
        ) from error
    return text


def check_peer_id(text: str) -> str:
    """A peer id in its base58 form.

    Raises:
        InputError: any other text.
    """
    if not _PEER_ID.fullmatch(text):
        raise InputError(
            f"{text[:80]!r} is not a peer id",
            code="bad_peer_id",
            remedy="a peer id has 52 letters and digits and begins with 12D3KooW; azu programs log theirs",
        )
    return text


def check_multiaddr(text: str) -> str:
    """An address such as /ip4/127.0.0.1/tcp/4001, with or without a peer id.

    Raises:
        InputError: not a multiaddr, or one with a part that azu does not know.
    """
    return _check(text, _EXAMPLE)


def check_peer_address(text: str) -> str:
    """An address of one certain peer: a multiaddr with its /p2p/ part.

    Raises:
        InputError: not a multiaddr, or one without a peer id.
    """
    if "/p2p/" not in _check(text, _EXAMPLE_PEER):
        raise _bad(text, "it does not say which peer is there (/p2p/...)", _EXAMPLE_PEER)
    return text


def _check(text: str, example: str) -> str:
    parts = text[: _LONGEST + 1].split("/")
    if len(text) > _LONGEST or parts[0] != "" or len(parts) < 3:
        raise _bad(text, "it is not of the form /protocol/value/...", example)
    remaining = parts[1:]
    while remaining:
        name = remaining.pop(0)
        if name in _VALUELESS:
            continue
        if name not in _VALUES:
            raise _bad(text, f"{name[:20]!r} is no protocol that azu knows", example)
        if not remaining or not _VALUES[name](remaining[0]):
            raise _bad(text, f"/{name} is not followed by {_WANTED[name]}", example)
        remaining.pop(0)
    return text


def _bad(text: str, why: str, example: str) -> InputError:
    return InputError(
        f"{text[:120]!r} is not a usable multiaddr: {why}",
        code="bad_multiaddr",
        remedy=f"give an address like {example}, as `azu-bootstrap run` prints it",
    )


def _is_ip4(text: str) -> bool:
    return _parses(ipaddress.IPv4Address, text)


def _is_ip6(text: str) -> bool:
    return _parses(ipaddress.IPv6Address, text)


def _parses(kind: Callable[[str], object], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65535


def _is_name(text: str) -> bool:
    return _HOST_NAME.fullmatch(text) is not None


def _is_peer_id(text: str) -> bool:
    return _PEER_ID.fullmatch(text) is not None


_VALUELESS = frozenset({"p2p-circuit", "quic-v1", "tls", "ws", "wss"})
_VALUES: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("dns", "dns4", "dns6", "dnsaddr"), _is_name),
    **dict.fromkeys(("tcp", "udp"), _is_port),
    "ip4": _is_ip4,
    "ip6": _is_ip6,
    "p2p": _is_peer_id,
}
_WANTED = {
    **dict.fromkeys(("dns", "dns4", "dns6", "dnsaddr"), "a host name"),
    **dict.fromkeys(("tcp", "udp"), "a port (0 to 65535)"),
    "ip4": "an IPv4 address",
    "ip6": "an IPv6 address",
    "p2p": "a peer id (12D3KooW...)",
}
