"""Why nobody answers: what is at an address, tried step by step (name, TCP, libp2p, the peer's key)."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from azu.dht.text import clip, printable
from azu.errors import AzuError, NetworkError
from azu.overlay import Overlay, PeerAddress, parse_peer_multiaddr

__all__ = ["explain"]

_CONNECT_SECONDS = 5.0
_HELLO_SECONDS = 3.0
_HELLO = b"\x13/multistream/1.0.0\n"  # how every libp2p connection begins, on both sides
_MAX_GREETING = 256  # bytes
_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")
_RETRY = "Try again; if it repeats, look at that node's log"
_CHECK_PORT = "Check the port: `azu-bootstrap run` prints its addresses, and uses 4001 unless told otherwise"
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@dataclass(frozen=True, slots=True)
class _Finding:
    code: str
    what: str
    remedy: str


async def explain(overlay: Overlay, addresses: Sequence[str], *, has_key: bool) -> NetworkError:
    """The error to raise where none of these peers could be reached: what is wrong with each, and what to do.

    has_key: whether the overlay has a swarm key, as all connections of a private swarm need.
    """
    findings: dict[str, _Finding] = {}

    async def probe(text: str) -> None:
        findings[text] = await _examine(overlay, parse_peer_multiaddr(text), has_key)

    async with trio.open_nursery() as nursery:
        for text in dict.fromkeys(addresses):
            nursery.start_soon(probe, text)
    found = [findings[text] for text in dict.fromkeys(addresses)]
    codes = {each.code for each in found}
    return NetworkError(
        f"no bootstrap node answered: {'; '.join(each.what for each in found)}",
        code=codes.pop() if len(codes) == 1 else "bootstrap_unreachable",
        remedy=". ".join(dict.fromkeys(each.remedy for each in found)),
    )


async def _examine(overlay: Overlay, target: PeerAddress, has_key: bool) -> _Finding:
    parts = target.address.split("/")
    if "p2p-circuit" in parts:
        return await _try_peer(overlay, target, has_key)
    place, host, port = target.address, parts[2], int(parts[4])
    try:
        with trio.fail_after(_CONNECT_SECONDS):
            stream = await trio.open_tcp_stream(host, port)
    except socket.gaierror as error:
        return _Finding(
            "unknown_host",
            f"the name {host} in {place} cannot be looked up ({error.strerror})",
            "Check its spelling and this machine's DNS, or give an /ip4/ address",
        )
    except (OSError, trio.TooSlowError) as error:
        return _unconnected(place, port, error)
    async with stream:
        greeting = _HELLO if has_key else await _greet(stream)  # in a private swarm even the greeting is encrypted
    if greeting != _HELLO:
        return _foreign(place, greeting)
    return await _try_peer(overlay, target, has_key)


def _unconnected(place: str, port: int, error: Exception) -> _Finding:
    if isinstance(error, trio.TooSlowError):
        what, code = f"{place} gives no answer at all", "no_answer"
        remedy = (
            f"The machine is off, has another IP address, or a firewall drops the packets: let TCP port {port} through"
        )
    elif errno.ECONNREFUSED in _numbers(error):
        what, code = f"nothing listens at {place} (connection refused)", "nothing_listens"
        remedy = f"Check that the node runs. {_CHECK_PORT}"
    elif any(number in _NO_WAY for number in _numbers(error)):
        what, code = f"there is no way from here to {place}", "no_route"
        remedy = "Check this machine's network connection, and whether it has IPv6 if that address needs it"
    else:
        what, code = f"{place} cannot be connected to ({error})", "bootstrap_unreachable"
        remedy = "Check the address, and this machine's network connection"
    return _Finding(code, what, remedy)


def _numbers(error: BaseException) -> set[int | None]:
    """Error numbers of a failed connect; trio raises a group of them where a name has several addresses."""
    causes = [error.__cause__] if isinstance(error.__cause__, BaseException) else []
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else causes
    return {getattr(error, "errno", None), *(number for each in inner for number in _numbers(each))}


async def _greet(stream: trio.SocketStream) -> bytes:
    """What the other side says to a libp2p hello; b"" if it hangs up, or says nothing."""
    greeting = b""
    with trio.move_on_after(_HELLO_SECONDS), contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(_HELLO)
        while len(greeting) < len(_HELLO) and (more := await stream.receive_some(_MAX_GREETING)):
            greeting += more
    return _HELLO if greeting.startswith(_HELLO) else greeting


def _foreign(place: str, greeting: bytes) -> _Finding:
    if not greeting:
        return _Finding(
            "silent",
            f"what listens at {place} takes connections, and does not answer as an azu node does",
            f"{_CHECK_PORT}. If it is right, that node hangs, or turns this machine away",
        )
    try:
        said = clip(printable(greeting.decode().strip().partition("\n")[0].rstrip()), 60)
    except UnicodeDecodeError:  # a private swarm's node begins with 24 random bytes
        return _Finding(
            "private_swarm",
            f"what listens at {place} speaks no libp2p in the clear: a private swarm's node, or another program",
            f"If it is a private swarm, give its key file with --swarm-key. {_CHECK_PORT}",
        )
    return _Finding("not_libp2p", f'what listens at {place} is no azu node: it says "{said}"', _CHECK_PORT)


async def _try_peer(overlay: Overlay, target: PeerAddress, has_key: bool) -> _Finding:
    """Something answers; what it is shows in the handshake."""
    try:
        await overlay.connect(target.peer_id, [target.address])
    except AzuError as error:
        others = set(_PEER_ID.findall(error.message)) - {target.peer_id, *_PEER_ID.findall(target.address)}
        if error.code == "wrong_peer" and others:
            found = others.pop()
            return _Finding(
                "wrong_peer",
                f"the node at {target.address} is {found}, not {target.peer_id}",
                f"If you trust it all the same, give {target.address}/p2p/{found}. A node that lost its identity.key "
                "comes back under another peer id",
            )
        remedy = _RETRY
        if has_key:
            remedy = "Compare the file of --swarm-key with that node's; leave it out where that swarm is public"
        what = f"{target.address} answers, and then fails ({printable(error.message)})"
        return _Finding("handshake_failed", what, remedy)
    return _Finding("bootstrap_unreachable", f"{target.address} did not answer at first, and does now", _RETRY)
