"""What home routers answer to those who ask them for a port: real servers, which map ports of the laboratory."""

from __future__ import annotations

import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from azu.overlay.nat.mapping import PortMapper
from tests.netlab import Home, Host

PORT = 4001
PATIENCE = 60.0
SSDP = ("239.255.255.250", 1900)
DESCRIPTION = """<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>
<device><deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType><deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANEthernetLinkConfig:1</serviceType>
<controlURL>/link</controlURL></service>
<service><serviceType>{service}</serviceType><controlURL>{control}</controlURL></service>
</serviceList></device></deviceList></device></deviceList></device></root>"""


class Table:
    """The mappings of a home's router, with their time."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._until: dict[int, float] = {}  # by external port
        self._inside: dict[int, tuple[str, int]] = {}
        self.renewed = 0

    @property
    def ports(self) -> set[int]:
        return set(self._until)

    def add(self, external: int, address: str, port: int, lifetime: float) -> bool:
        """False if another host has it."""
        if self._inside.get(external, (address, port)) != (address, port):
            return False
        if external in self._until:
            self.renewed += 1
        else:
            host = next(each for each in self._home.hosts if each.address == address)
            self._home.map_port(external, host, port)
        self._until[external] = trio.current_time() + lifetime
        self._inside[external] = (address, port)
        return True

    def remove(self, external: int) -> bool:
        if self._until.pop(external, None) is None:
            return False
        del self._inside[external]
        self._home.unmap_port(external)
        return True

    def inside(self, address: str, port: int) -> list[int]:
        return [external for external, inner in self._inside.items() if inner == (address, port)]

    async def expire(self) -> None:
        while True:
            for external in [each for each, until in self._until.items() if until <= trio.current_time()]:
                self.remove(external)
            await trio.sleep(0.05)


def lan_of(home: Home) -> str:
    return home.hosts[0].address.rpartition(".")[0] + ".1"


async def udp_socket(host: Host, address: str, port: int) -> trio.socket.SocketType:
    with host.entered():
        udp = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await udp.bind((address, port))
    return udp


async def natpmp(
    home: Home, table: Table, *, address: str | None = None, task_status: Any = trio.TASK_STATUS_IGNORED
) -> None:
    """RFC 6886, as far as TCP goes; `address` is what it claims to be outside."""
    told = bytes(map(int, (address or home.address).split(".")))
    with await udp_socket(home.router, lan_of(home), 5351) as udp:
        task_status.started()
        while True:
            request, client = await udp.recvfrom(64)
            version, operation = request[:2]
            assert version == 0
            if operation == 0:
                await udp.sendto(struct.pack(">BBHI", 0, 128, 0, 7) + told, client)
                continue
            assert operation == 2
            _, port, external, lifetime = struct.unpack(">HHHI", request[2:])
            if lifetime == 0:
                assert external == 0
                for each in table.inside(client[0], port):
                    table.remove(each)
            else:
                while not table.add(external, client[0], port, lifetime):
                    external += 1
            await udp.sendto(struct.pack(">BBHIHHI", 0, 130, 0, 7, port, external, lifetime), client)


async def ssdp(home: Home, location: str, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Answer multicast searches for an Internet Gateway Device."""
    with await udp_socket(home.router, SSDP[0], SSDP[1]) as udp:  # unicast ones go unheard, as with some routers
        membership = bytes(map(int, SSDP[0].split("."))) + bytes(map(int, lan_of(home).split(".")))
        udp.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_ADD_MEMBERSHIP, membership)
        head = "HTTP/1.1 200 OK\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
        with await udp_socket(home.router, lan_of(home), 1900) as answering:
            task_status.started()
            while True:
                request, client = await udp.recvfrom(2048)
                if request.startswith(b"M-SEARCH") and b"InternetGatewayDevice:1" in request:
                    await answering.sendto(f"{head}LOCATION: {location}\r\nEXT:\r\n\r\n".encode(), client)


Answer = Callable[[str, str, str, str], tuple[int, str]]  # method, path, SOAP action, body, to status and body


async def http(home: Home, answer: Answer, *, port: int = 0, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """A web server on the router's LAN side."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
                part = await stream.receive_some()
                if not part:
                    return
                data += part
            head, _, body = data.partition(b"\r\n\r\n")
            method, path, _ = head.decode().split(" ", 2)
            action = re.search(r'^soapaction: "?[^#\r]*#(\w+)', head.decode(), re.IGNORECASE | re.MULTILINE)
            status, text = answer(method, path, action[1] if action else "", body.decode())
            reply = (
                f"HTTP/1.1 {status} -\r\nContent-Type: text/xml\r\nContent-Length: {len(text.encode())}\r\n\r\n{text}"
            )
            try:
                await stream.send_all(reply.encode())
            except trio.BrokenResourceError:
                return  # the client has had enough

    with home.router.entered():
        listening = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM)
    await listening.bind((lan_of(home), port))
    listening.listen(16)
    task_status.started(listening.getsockname()[1])
    await trio.serve_listeners(serve, [trio.SocketListener(listening)])


def _length(data: bytes) -> int:
    match = re.search(rb"^content-length: (\d+)", data.partition(b"\r\n\r\n")[0], re.IGNORECASE | re.MULTILINE)
    return int(match[1]) if match else 0


def igd(
    home: Home,
    table: Table,
    *,
    service: str = "urn:schemas-upnp-org:service:WANIPConnection:1",
    control: str = "/control",
    permanent: bool = False,
) -> Answer:
    """An Internet Gateway Device; `permanent` knows no leases, as old ones."""

    def answer(method: str, path: str, action: str, body: str) -> tuple[int, str]:
        if method == "GET":
            return 200, DESCRIPTION.format(service=service, control=control)
        assert path == "/control"
        assert f'xmlns:u="{service}"' in body
        told = dict(re.findall(r"<(New\w+)>([^<]*)</", body))
        if action == "GetExternalIPAddress":
            return 200, envelope(f"<NewExternalIPAddress>{home.address}</NewExternalIPAddress>")
        assert told["NewProtocol"] == "TCP"
        external = int(told["NewExternalPort"])
        if action == "DeletePortMapping":
            return (200, envelope("")) if table.remove(external) else fault(714)
        assert action == "AddPortMapping"
        lifetime = int(told["NewLeaseDuration"])
        if permanent and lifetime:
            return fault(725)
        taken = table.add(external, told["NewInternalClient"], int(told["NewInternalPort"]), lifetime or 1e9)
        return (200, envelope("")) if taken else fault(718)

    return answer


def envelope(inner: str) -> str:
    return f'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{inner}</s:Body></s:Envelope>'


def fault(number: int) -> tuple[int, str]:
    inner = f'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{number}</errorCode></UPnPError>'
    return 500, envelope(f"<s:Fault><detail>{inner}</detail></s:Fault>")


@asynccontextmanager
async def running(*servers: Callable[..., Awaitable[None]]) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for server in servers:
            await nursery.start(server)
        yield
        nursery.cancel_scope.cancel()


def at(host: Host, function: Callable[[], Awaitable[None]]) -> None:
    """Run this with the sockets of a host."""

    async def bounded() -> None:
        with trio.fail_after(PATIENCE):
            await function()

    with host.entered():
        trio.run(bounded)


@asynccontextmanager
async def mapper(lifetime: int = 3600) -> AsyncIterator[PortMapper]:
    mapping = PortMapper(lifetime)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mapping.run)
        yield mapping
        nursery.cancel_scope.cancel()


async def greets(stranger: Host, address: str, external: int) -> bool:
    """Whether what a stranger connects to is our host's port."""
    listening = trio.socket.socket()
    listening.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
    await listening.bind(("", PORT))
    listening.listen()
    with stranger.entered():
        outside = trio.socket.socket()
    with listening, outside, trio.move_on_after(0.7):
        await outside.connect((address, external))
        inside, _ = await listening.accept()
        with inside:
            await inside.send(b"hello")
            return await outside.recv(5) == b"hello"
    return False
