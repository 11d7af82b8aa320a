"""UPnP: a port mapping by an Internet Gateway Device, found by SSDP and asked by SOAP.

Sources: UPnP Device Architecture 1.1 (sections 1.3 search, 2.3 description, 3.1 control); UPnP Forum, WANIPConnection:1
and :2 and WANPPPConnection:1, which name the actions and error codes.

Only the default gateway is listened to, and only it is asked: every machine in a network can answer a search.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import h11
import trio

from azu.errors import AzuError, NetworkError, ProtocolError
from azu.overlay.nat.gateway import Gateway, external_address

__all__ = ["Igd", "find_igds"]

SSDP = ("239.255.255.250", 1900)
_SEARCHED = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
)
_SEARCHES = (1.25, 1.25)  # seconds to wait after each: datagrams get lost, and devices may take a second (MX)
_MORE_SECONDS = 0.2  # for further answers after the first
_REQUEST_SECONDS = 3.0  # one HTTP exchange
_MAX_LOCATIONS = 4
_MAX_ANSWER_BYTES = 64 * 1024  # a description of a large device has some 10 KiB
_MAX_SERVICES = 4
_SERVICE = re.compile(r"urn:schemas-upnp-org:service:WAN(IP|PPP)Connection:([12])")
_LOCATION = re.compile(rb"^location:[ \t]*([\x21-\x7e]{1,512})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_CONFLICT, _ONLY_PERMANENT = "718", "725"
_OTHER_PORTS = 3  # tried where the wanted one is taken


class _Refused(NetworkError):
    """A UPnP error; `number` is its errorCode."""

    def __init__(self, action: str, number: str) -> None:
        super().__init__(f"the router refuses {action} (UPnP error {number})")
        self.number = number


@dataclass(frozen=True, slots=True)
class Igd:
    """A router's connection to the internet: the service's type and the URL where it is controlled."""

    gateway: Gateway
    service: str
    control: str

    @property
    def name(self) -> str:
        """For people."""
        return "UPnP"

    async def external_address(self) -> str:
        """The router's public IPv4 address.

        Raises:
            NetworkError: no answer, a refusal, or an address that is not public. ProtocolError: a malformed answer.
        """
        return external_address((await self._call("GetExternalIPAddress", {})).get("NewExternalIPAddress", ""))

    async def add(self, port: int, wanted: int, lifetime: int) -> tuple[int, int]:
        """Lead a TCP port of the router here; which port it is, and for how many seconds (0: for good).

        Raises:
            NetworkError: no answer, or a refusal. ProtocolError: a malformed answer.
        """
        others = random.sample(range(20_000, 60_000), _OTHER_PORTS)  # to miss what others have taken
        for external in (wanted, *others):
            try:
                return external, await self._add(port, external, lifetime)
            except _Refused as error:
                if error.number != _CONFLICT:
                    raise
        raise NetworkError("the router has given these ports to others")

    async def _add(self, port: int, external: int, lifetime: int) -> int:
        arguments = {
            "NewRemoteHost": "",
            "NewExternalPort": str(external),
            "NewProtocol": "TCP",
            "NewInternalPort": str(port),
            "NewInternalClient": str(self.gateway.own),
            "NewEnabled": "1",
            "NewPortMappingDescription": "azu",
            "NewLeaseDuration": str(lifetime),
        }
        try:
            await self._call("AddPortMapping", arguments)
        except _Refused as error:
            if error.number != _ONLY_PERMANENT:
                raise
            await self._call("AddPortMapping", {**arguments, "NewLeaseDuration": "0"})
            return 0
        return lifetime

    async def remove(self, port: int, external: int) -> None:
        """Take it away. Raises as `add`."""
        arguments = {"NewRemoteHost": "", "NewExternalPort": str(external), "NewProtocol": "TCP"}
        await self._call("DeletePortMapping", arguments)

    async def _call(self, action: str, arguments: Mapping[str, str]) -> dict[str, str]:
        fields = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments.items())
        body = (
            '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
            's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
            f'<u:{action} xmlns:u="{self.service}">{fields}</u:{action}></s:Body></s:Envelope>'
        )
        headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{self.service}#{action}"'}
        status, answer = await _exchange("POST", self.control, headers, body.encode())
        if status not in (200, 500):  # 500 carries a UPnP error
            raise NetworkError(f"the router answers {action} with HTTP {status}")
        told = {_bare(each.tag): (each.text or "").strip() for each in _parsed(answer).iter()}
        if status == 500:
            raise _Refused(action, told.get("errorCode", "unknown")[:5])
        return told


async def find_igds(gateway: Gateway) -> list[Igd]:
    """The gateway's connections to the internet, if it is an Internet Gateway Device; not all need be up.

    Raises:
        NetworkError: it does not answer. ProtocolError: it answers, but with nothing usable.
    """
    locations = await _search(gateway)
    if not locations:
        raise NetworkError("the router does not answer UPnP searches")
    failures: list[AzuError] = []
    for location in locations:
        try:
            status, description = await _exchange("GET", location, {}, b"")
            if status != 200:
                raise NetworkError(f"the router's UPnP description has HTTP status {status}")
            return _described(gateway, location, description)
        except (NetworkError, ProtocolError) as error:
            failures.append(error)
    raise failures[0]


async def _search(gateway: Gateway) -> list[str]:
    """URLs of descriptions that the gateway has told, each at its own address."""
    found: dict[str, None] = {}
    try:
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
            udp.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_MULTICAST_TTL, 2)
            udp.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_MULTICAST_IF, gateway.own.packed)
            await udp.bind((str(gateway.own), 0))
            for seconds in _SEARCHES:
                if not found:
                    await _send_searches(udp, gateway)
                    await _collect(udp, gateway, found, seconds)
    except OSError as error:
        raise NetworkError(f"the network takes no UPnP search: {error.strerror}") from error
    return list(found)


async def _send_searches(udp: trio.socket.SocketType, gateway: Gateway) -> None:
    for target in _SEARCHED:
        search = f'M-SEARCH * HTTP/1.1\r\nHOST: {SSDP[0]}:{SSDP[1]}\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: {target}'
        for address in (SSDP, (str(gateway.address), SSDP[1])):  # some routers answer only one of these
            await udp.sendto(search.encode() + b"\r\n\r\n", address)


async def _collect(udp: trio.socket.SocketType, gateway: Gateway, found: dict[str, None], seconds: float) -> None:
    with trio.move_on_after(seconds) as scope:
        while len(found) < _MAX_LOCATIONS:
            answer, (source, *_) = await udp.recvfrom(4096)
            match = _LOCATION.search(answer) if source == str(gateway.address) else None
            if match is not None and _is_at(gateway, location := match[1].decode("ascii")):
                found[location] = None
                # Further answers are its other devices and services, mostly with the same description.
                scope.deadline = min(scope.deadline, trio.current_time() + _MORE_SECONDS)


def _described(gateway: Gateway, location: str, description: bytes) -> list[Igd]:
    root = _parsed(description)
    base = next((each.text for each in root if _bare(each.tag) == "URLBase" and each.text), location)
    services: list[tuple[str, str]] = []
    for each in root.iter():
        if _bare(each.tag) == "service":
            told = {_bare(field.tag): (field.text or "").strip() for field in each}
            if _SERVICE.fullmatch(told.get("serviceType", "")):
                services.append((told["serviceType"], told.get("controlURL", "")))
    usable = [(service, _joined(base.strip(), path)) for service, path in services[:_MAX_SERVICES]]
    igds = [Igd(gateway, service, control) for service, control in usable if _is_at(gateway, control)]
    if not igds:
        raise ProtocolError("the router's UPnP description has no connection to the internet", code="bad_router")
    return igds


def _joined(base: str, path: str) -> str:
    try:
        return urljoin(base, path)
    except ValueError:
        return ""


def _is_at(gateway: Gateway, url: str) -> bool:
    """Whether a URL that the router told leads to itself, so that it cannot make us ask others."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme == "http"
            and parts.hostname == str(gateway.address)
            and parts.port != 0
            and "@" not in parts.netloc
        )
    except ValueError:
        return False


async def _exchange(method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
    """One HTTP request, without redirects and proxies; status and body."""
    parts = urlsplit(url)
    try:
        with trio.fail_after(_REQUEST_SECONDS):
            client = h11.Connection(h11.CLIENT)
            head = {**headers, "Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"}
            target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
            request = client.send(h11.Request(method=method, target=target, headers=list(head.items())))
            async with await trio.open_tcp_stream(str(parts.hostname), parts.port or 80) as stream:
                await stream.send_all((request or b"") + body)
                client.send(h11.Data(data=body))
                client.send(h11.EndOfMessage())
                return await _response(client, stream)
    except trio.TooSlowError as error:
        raise NetworkError("the router's UPnP server does not answer in time") from error
    except (OSError, trio.BrokenResourceError) as error:
        raise NetworkError(f"the router's UPnP server fails: {error}") from error
    except (h11.ProtocolError, ValueError) as error:  # ValueError: a URL that cannot be sent
        raise ProtocolError(f"the router's UPnP server speaks no HTTP: {error}", code="bad_router") from error


async def _response(client: h11.Connection, stream: trio.SocketStream) -> tuple[int, bytes]:
    status, body = 0, bytearray()
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(await stream.receive_some(65_536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _MAX_ANSWER_BYTES:
                raise ProtocolError("the router's UPnP answer is too long", code="bad_router")
        elif not isinstance(event, h11.InformationalResponse):
            return status, bytes(body)


def _parsed(data: bytes) -> ElementTree.Element:
    """An XML document without a DTD, so that there are no entities to expand or to fetch."""
    try:
        text = data.decode("utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ProtocolError("the router's UPnP answer has a DTD", code="bad_router")
        return ElementTree.fromstring(text)  # noqa: S314 - no DTD, bounded in size, and a str has no other encoding
    except (ValueError, ElementTree.ParseError) as error:
        raise ProtocolError("the router's UPnP answer is not XML", code="bad_router") from error


def _bare(tag: str) -> str:
    return tag.rpartition("}")[2]
