"""Multiaddrs: parse what operators type, expand what a wildcard listener means."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from azu.errors import InputError

__all__ = [
    "OwnAddresses",
    "PeerAddress",
    "expand_addresses",
    "interface_hosts",
    "line_of",
    "parse_announced",
    "parse_circuit",
    "parse_dial_address",
    "parse_listen_address",
    "parse_peer_id",
    "parse_peer_multiaddr",
    "peer_id_of",
]

_KEPT_IDS = 4096  # base58 in Python costs more than all else that is done with an id: those in use are kept

_EXAMPLE = "Write it like /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW... (ip4, ip6, dns4 or dns6, then tcp, then p2p)"
_HOSTS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


class PeerAddress(NamedTuple):
    """A dialable address of a known peer: `peer_id` (base58) and `address` (multiaddr without that /p2p)."""

    peer_id: str
    address: str


def parse_peer_multiaddr(text: str) -> PeerAddress:
    """Split a full multiaddr such as /ip4/../tcp/../p2p/.. into peer id and address.

    Raises:
        InputError: `text` is malformed, is not TCP, or names no peer.
    """
    parts = _parse(text)
    if parts[-1][0] != "p2p":
        raise _bad(text, "it must end in /p2p/<peer id>")
    _require_dialable(text, parts[:-1])
    peer_id = parts[-1][1]
    parse_peer_id(peer_id)
    return PeerAddress(peer_id, _join(parts[:-1]))


def parse_dial_address(text: str, peer_id: str) -> Multiaddr:
    """An address to dial `peer_id` at; the /p2p suffix may be missing.

    Raises:
        InputError: malformed, not TCP, or it names another peer than `peer_id`.
    """
    parts = _parse(text)
    if parts[-1][0] == "p2p":
        if parts[-1][1] != peer_id:
            raise _bad(text, f"it names another peer than {peer_id}")
        parts = parts[:-1]
    _require_dialable(text, parts)
    return Multiaddr(_join(parts))


def parse_circuit(text: str) -> PeerAddress:
    """The relay in an address that ends in /p2p-circuit, or has the peer behind it.

    Raises:
        InputError: it is none, or malformed.
    """
    names = [name for name, _ in _parse(text)]
    if "p2p-circuit" not in names:
        raise _bad(text, "it names no relay")
    return parse_peer_multiaddr(_join(_parse(text)[: names.index("p2p-circuit")]))


def parse_listen_address(text: str) -> Multiaddr:
    """An address to listen on: /ip4 or /ip6, then /tcp.

    Raises:
        InputError: anything else.
    """
    parts = _parse(text)
    if [name for name, _ in parts] not in (["ip4", "tcp"], ["ip6", "tcp"]):
        raise _bad(text, "a listen address is /ip4/<address>/tcp/<port> or /ip6/<address>/tcp/<port>")
    return Multiaddr(_join(parts))


def parse_announced(text: str) -> Multiaddr:
    """An address to tell others: where a router or a name leads to this node; without /p2p.

    Raises:
        InputError: malformed, not TCP, or an IPv6 link-local address, which nobody could dial.
    """
    parts = _parse(text)
    _require_tcp(text, parts)
    if parts[0][0] == "ip6" and ipaddress.ip_address(parts[0][1]).is_link_local:
        raise _bad(text, "nobody else can dial a link-local address")
    return Multiaddr(_join(parts))


@lru_cache(maxsize=_KEPT_IDS)
def parse_peer_id(text: str) -> ID:
    """A peer id from its base58 text.

    Raises:
        InputError: it is not a base58 multihash.
    """
    try:
        peer_id = peer_id_of(ID.from_base58(text).to_bytes())
    except Exception as error:  # base58 raises ValueError; py-libp2p adds its own
        raise _bad_peer_id(text) from error
    if str(peer_id) != text:
        raise _bad_peer_id(text)
    return peer_id


@lru_cache(maxsize=_KEPT_IDS)
def peer_id_of(raw: bytes) -> ID:
    """A peer id from the bytes that stand for it in messages.

    Raises:
        InputError: it is not as long as a peer id.
    """
    # An Ed25519 identity hash has 38 bytes; sha2-256 multihashes of older keys have 34.
    if len(raw) not in (34, 38):
        raise _bad_peer_id(raw[:40].hex())
    return ID(raw)


class OwnAddresses:
    """What this node tells others of where it is, for libp2p's host: `found` beyond its interfaces, and then those.

    Args:
        announced: multiaddrs without /p2p that are told instead of the interfaces' own.
    """

    def __init__(self, announced: Sequence[str] = ()) -> None:
        self._announced = announced
        self.found: Callable[[], Sequence[str]] = tuple

    def __call__(self, listening: Sequence[Multiaddr]) -> list[Multiaddr]:
        """The addresses, without duplicates and without /p2p, those first that most can dial."""
        own = self._announced or [str(each) for each in expand_addresses(listening)]
        return [Multiaddr(each) for each in dict.fromkeys((*self.found(), *own))]


def expand_addresses(listening: Sequence[Multiaddr]) -> list[Multiaddr]:
    """Replace wildcard hosts by this machine's interface addresses; public ones first, loopback last.

    IPv6 link-local ones are left out: whoever is told them would have to know which of its interfaces they belong to.
    """
    found: dict[str, tuple[bool, bool]] = {}
    for address in listening:
        (family, host), (_, port), *_ = _parts_of(address)
        hosts = interface_hosts(family) if ipaddress.ip_address(host).is_unspecified else [host]
        for each in hosts:
            parsed = ipaddress.ip_address(each)
            if parsed.version == 6 and parsed.is_link_local:
                continue
            found.setdefault(f"/{family}/{each}/tcp/{port}", (parsed.is_loopback, not parsed.is_global))
    return [Multiaddr(text) for text, _ in sorted(found.items(), key=lambda item: item[1])]


def interface_hosts(family: str) -> list[str]:
    """This machine's addresses of a family (ip4 or ip6), loopback last, link-local ones left out."""
    found = get_network_addrs(4 if family == "ip4" else 6)  # without loopback and link-local ones
    return [*dict.fromkeys(str(each) for each in found), "127.0.0.1" if family == "ip4" else "::1"]


def line_of(host: str) -> str:
    """What one customer of a provider has: an IPv4 address, or an IPv6 network of 56 bits (RFC 6177), as text."""
    family = ipaddress.ip_address(host).version
    return host if family == 4 else str(ipaddress.ip_network((host.partition("%")[0], 56), strict=False))


def _parse(text: str) -> list[tuple[str, str]]:
    if not text.startswith("/") or len(text) > 1024:
        raise _bad(text[:200], "it must start with /ip4, /ip6 or /dns4")
    try:
        parts = _parts_of(Multiaddr(text))
    except Exception as error:  # py-multiaddr raises a dozen types, ValueError and KeyError among them
        raise _bad(text, str(error)) from error
    if not parts:
        raise _bad(text, "it is empty")
    return parts


def _parts_of(address: Multiaddr) -> list[tuple[str, str]]:
    return [(protocol.name, str(value)) for protocol, value in address.items()]


def _require_dialable(text: str, parts: Sequence[tuple[str, str]]) -> None:
    """TCP, or TCP to a relay."""
    if parts and parts[-1][0] == "p2p-circuit":
        if len(parts) != 4 or parts[2][0] != "p2p":
            raise _bad(text, "a relayed address is /ip4/<address>/tcp/<port>/p2p/<relay>/p2p-circuit/p2p/<peer id>")
        parse_peer_id(parts[2][1])
        parts = parts[:2]
    _require_tcp(text, parts)


def _require_tcp(text: str, parts: Sequence[tuple[str, str]]) -> None:
    if len(parts) != 2 or parts[0][0] not in _HOSTS or parts[1][0] != "tcp":
        raise _bad(text, "azu speaks plain TCP only (no QUIC or WebSocket addresses)")
    if parts[1][1] == "0":
        raise _bad(text, "port 0 cannot be dialled")


def _join(parts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"/{name}/{value}" if value != "None" else f"/{name}" for name, value in parts)


def _bad(text: str, why: str) -> InputError:
    return InputError(f"{text!r} is not a usable address: {why}", code="bad_multiaddr", remedy=_EXAMPLE)


def _bad_peer_id(text: str) -> InputError:
    return InputError(
        f"{str(text)[:100]!r} is not a peer id",
        code="bad_peer_id",
        remedy="A peer id looks like 12D3KooW... (base58, 52 characters)",
    )
