"""A home router is asked for a port, and strangers then get through it."""

from __future__ import annotations

import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address

import pytest
import trio

from azu.errors import AzuError, NetworkError, ProtocolError
from azu.overlay.nat.gateway import Gateway
from azu.overlay.nat.natpmp import NatPmp
from tests.netlab import Home, Host, Lab, laboratory
from tests.overlay.nat.routers import (
    PATIENCE,
    PORT,
    Answer,
    Table,
    at,
    greets,
    http,
    igd,
    lan_of,
    mapper,
    natpmp,
    running,
    ssdp,
    udp_socket,
)

lab = pytest.fixture(laboratory)


@asynccontextmanager
async def upnp(home: Home, answer: Answer) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(http, home, answer))
        await nursery.start(ssdp, home, f"http://{lan_of(home)}:{port}/rootDesc.xml")
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.02)


async def maps_and_unmaps(home: Home, stranger: Host, table: Table) -> None:
    assert not await greets(stranger, home.address, PORT)
    async with mapper() as mapping:
        found = await mapping.map_port(PORT)
        assert found is not None
        (external,) = table.ports
        assert found == f"/ip4/{home.address}/tcp/{external}"
        assert await greets(stranger, home.address, external)
        assert await mapping.map_port(PORT) == found
        assert table.renewed == 1
    assert not table.ports
    assert not await greets(stranger, home.address, external)


def test_by_natpmp(lab: Lab) -> None:
    home, stranger = lab.home(), lab.public_host()
    table = Table(home)

    async def run() -> None:
        async with running(partial(natpmp, home, table)):
            await maps_and_unmaps(home, stranger, table)

    at(home.hosts[0], run)


@pytest.mark.parametrize(
    ("service", "permanent"), [("WANIPConnection:1", True), ("WANIPConnection:2", False), ("WANPPPConnection:1", False)]
)
def test_by_upnp(lab: Lab, service: str, permanent: bool) -> None:
    home, stranger = lab.home(), lab.public_host()
    table = Table(home)
    answer = igd(home, table, service=f"urn:schemas-upnp-org:service:{service}", permanent=permanent)

    async def run() -> None:
        async with upnp(home, answer):
            await maps_and_unmaps(home, stranger, table)

    at(home.hosts[0], run)


def test_a_port_that_another_host_has_gives_way(lab: Lab) -> None:
    home, stranger = lab.home(hosts=2), lab.public_host()

    async def by(table: Table) -> None:
        table.add(PORT, home.hosts[1].address, PORT, 1e9)
        async with mapper() as mapping:
            found = await mapping.map_port(PORT)
            (external,) = table.ports - {PORT}
            assert found == f"/ip4/{home.address}/tcp/{external}"
            assert await greets(stranger, home.address, external)
        assert table.ports == {PORT}
        table.remove(PORT)

    async def run() -> None:
        table = Table(home)
        async with running(partial(natpmp, home, table)):
            await by(table)
        table = Table(home)
        async with upnp(home, igd(home, table)):
            await by(table)

    at(home.hosts[0], run)


def test_it_is_renewed_in_time_and_ends_with_us(lab: Lab) -> None:
    home = lab.home()
    table = Table(home)

    async def run() -> None:
        async with running(partial(natpmp, home, table)), trio.open_nursery() as nursery:
            nursery.start_soon(table.expire)
            async with mapper(lifetime=2) as mapping:
                await mapping.map_port(PORT)
                await until(lambda: table.renewed >= 3)  # the lifetime is over by then
                assert table.ports == {PORT}
            assert not table.ports
            table.add(PORT, home.hosts[0].address, PORT, 0.1)
            await until(lambda: not table.ports)  # what is not renewed does go
            nursery.cancel_scope.cancel()

    at(home.hosts[0], run)


def test_a_router_that_restarts_is_asked_again(lab: Lab) -> None:
    home = lab.home()
    before, after = Table(home), Table(home)

    async def run() -> None:
        async with mapper(lifetime=3) as mapping:
            async with running(partial(natpmp, home, before)):
                assert await mapping.map_port(PORT)
                before.remove(PORT)
            async with upnp(home, igd(home, after)):  # and with other firmware
                await until(lambda: after.ports == {PORT})

    at(home.hosts[0], run)


async def refusal(told: bytes) -> AzuError:
    """What comes of a NAT-PMP server on loopback that answers everything with this."""
    gateway = Gateway(IPv4Address("127.0.0.2"), IPv4Address("127.0.0.1"))
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp, trio.fail_after(PATIENCE):
        await udp.bind((str(gateway.address), 5351))
        async with trio.open_nursery() as nursery:

            async def babble() -> None:
                while True:
                    _, client = await udp.recvfrom(64)
                    await udp.sendto(told, client)

            nursery.start_soon(babble)
            try:
                await NatPmp(gateway).external_address()
            except AzuError as error:
                return error
            finally:
                nursery.cancel_scope.cancel()
    raise AssertionError("it was believed")


@pytest.mark.parametrize("address", ["10.3.2.1", "100.64.0.9", "224.0.0.1", "127.0.0.1", "0.0.0.0"])
async def test_a_router_without_a_public_address_is_no_help(address: str) -> None:
    error = await refusal(struct.pack(">BBHI", 0, 128, 0, 7) + IPv4Address(address).packed)
    assert isinstance(error, NetworkError)
    assert address in error.message


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"\x00",
        b"\x00\x82\x00\x00" + bytes(8),  # an answer to another question
        b"\x00\x80\x00\x02" + bytes(8),  # refused
        b"\x01\x80\x00\x00\x00\x00\x00\x07\x19\x01\x00\x01",  # another version
        struct.pack(">BBHI", 0, 128, 0, 7) + b"\x19\x01\x00\x01" * 12,  # too long
    ],
)
async def test_malformed_natpmp_is_refused(told: bytes) -> None:
    assert isinstance(await refusal(told), NetworkError | ProtocolError)


def garbage(_: str, __: str, ___: str, ____: str) -> tuple[int, str]:
    return 200, "<root><unclosed></root>"


def described(home: Home, change: Callable[[str], str]) -> Answer:
    """A good device, but for its description."""
    good = igd(home, Table(home))

    def answer(method: str, path: str, action: str, body: str) -> tuple[int, str]:
        status, text = good(method, path, action, body)
        return status, change(text) if method == "GET" else text

    return answer


def endless(text: str) -> str:
    return f"{text}<!--{'x' * 1_000_000}-->"


def bomb(text: str) -> str:
    return text.replace("<root", '<!DOCTYPE root [<!ENTITY b "/control">]><root').replace("/control<", "&b;<")


def failing(_: str, __: str, ___: str, ____: str) -> tuple[int, str]:
    return 503, ""


def refusing(home: Home) -> Answer:
    good = igd(home, Table(home))

    def answer(method: str, path: str, action: str, body: str) -> tuple[int, str]:
        return (
            good(method, path, action, body)
            if action != "AddPortMapping"
            else (500, "<e><errorCode>606</errorCode></e>")
        )

    return answer


def test_a_broken_upnp_server_costs_a_bounded_time(lab: Lab) -> None:
    home = lab.home()
    answers = (garbage, described(home, endless), described(home, bomb), failing, refusing(home))

    async def run() -> None:
        for answer in answers:
            async with upnp(home, answer), mapper() as mapping:
                assert await mapping.map_port(PORT) is None
        async with upnp(home, igd(home, Table(home))), mapper() as mapping:  # it was these that were in the way
            assert await mapping.map_port(PORT) is not None

    started = time.monotonic()
    at(home.hosts[0], run)
    assert time.monotonic() - started < 20


def test_servers_that_never_answer_cost_a_bounded_time(lab: Lab) -> None:
    home = lab.home()

    async def swallow(*, task_status: trio.TaskStatus[None]) -> None:
        with await udp_socket(home.router, lan_of(home), 5351) as udp:
            task_status.started()
            while True:
                await udp.recvfrom(64)

    async def hang(*, task_status: trio.TaskStatus[int]) -> None:
        with home.router.entered():
            listening = trio.socket.socket()
        with listening:
            await listening.bind((lan_of(home), 0))
            listening.listen()
            task_status.started(listening.getsockname()[1])
            await trio.sleep_forever()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(swallow)
            port = await nursery.start(hang)
            await nursery.start(ssdp, home, f"http://{lan_of(home)}:{port}/")
            async with mapper() as mapping:
                assert await mapping.map_port(PORT) is None
            nursery.cancel_scope.cancel()

    started = time.monotonic()
    at(home.hosts[0], run)
    assert 3 < time.monotonic() - started < 20  # it was asked, and waited for


def test_no_router_makes_us_ask_another_machine(lab: Lab) -> None:
    home = lab.home(hosts=2)
    table = Table(home)
    other = home.hosts[1]
    asked: list[str] = []

    async def watch(*, task_status: trio.TaskStatus[int]) -> None:
        with other.entered():
            listening = trio.socket.socket()
        with listening:
            await listening.bind((other.address, 0))
            listening.listen()
            task_status.started(listening.getsockname()[1])
            while True:
                connection, client = await listening.accept()
                asked.append(client[0])
                connection.close()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            port = await nursery.start(watch)
            url = f"http://{other.address}:{port}/control"
            await nursery.start(ssdp, home, url)  # a description elsewhere
            async with mapper() as mapping:
                assert await mapping.map_port(PORT) is None
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            port = await nursery.start(watch)
            control = f"http://{other.address}:{port}/control"
            async with upnp(home, igd(home, table, control=control)), mapper() as mapping:
                assert await mapping.map_port(PORT) is None  # a control URL elsewhere
            nursery.cancel_scope.cancel()

    at(home.hosts[0], run)
    assert not asked


def test_a_neighbour_that_plays_the_router_is_not_heard(lab: Lab) -> None:
    home = lab.home(hosts=2)
    fake = Home(home.hosts[1], home.hosts)

    async def answer_searches(*, task_status: trio.TaskStatus[None]) -> None:
        with await udp_socket(fake.router, "239.255.255.250", 1900) as udp:
            membership = bytes((239, 255, 255, 250)) + bytes(map(int, fake.router.address.split(".")))
            udp.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_ADD_MEMBERSHIP, membership)
            with await udp_socket(fake.router, fake.router.address, 1900) as answering:
                task_status.started()
                while True:
                    _, client = await udp.recvfrom(2048)
                    heard.append(client[0])
                    await answering.sendto(f"HTTP/1.1 200 OK\r\nLOCATION: {url}\r\n\r\n".encode(), client)

    heard: list[str] = []
    table = Table(home)
    url = ""

    async def run() -> None:
        nonlocal url
        async with trio.open_nursery() as nursery:
            port = await nursery.start(partial(http, home, igd(home, table)))
            url = f"http://{lan_of(home)}:{port}/rootDesc.xml"  # even if what it says were true
            await nursery.start(answer_searches)
            async with mapper() as mapping:
                assert await mapping.map_port(PORT) is None
            nursery.cancel_scope.cancel()

    at(home.hosts[0], run)
    assert heard
    assert not table.ports


def test_a_machine_without_a_gateway_is_told_so_at_once(lab: Lab) -> None:
    home = lab.home()
    subprocess.run(["ip", "-netns", home.hosts[0].namespace, "route", "del", "default"], check=True)

    async def run() -> None:
        async with mapper() as mapping:
            assert await mapping.map_port(PORT) is None

    started = time.monotonic()
    at(home.hosts[0], run)
    assert time.monotonic() - started < 5
