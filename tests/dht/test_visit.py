"""Every way of not getting in has its own words, against real sockets and real nodes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from azu.config import DhtSettings
from azu.dht import diagnosis
from azu.dht import visit as visit_module
from azu.dht.visit import entrances, rejoin, visit
from azu.errors import NetworkError
from azu.overlay import host, open_overlay
from azu.swarm_key import read_swarm_key, write_new_swarm_key
from tests.dht.records import identity, worker
from tests.dht.swarm import LIMIT, a_swarm, config

WANTED = identity(7).peer_id


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AZU_BOOTSTRAP", "AZU_SWARM_KEY"):
        monkeypatch.delenv(name, raising=False)


async def refusal(*addresses: str, swarm_key: Path | None = None) -> NetworkError:
    with trio.fail_after(LIMIT), pytest.raises(NetworkError) as refused:
        async with visit(DhtSettings(bootstrap=addresses, swarm_key=swarm_key)):
            pytest.fail("it let us in")
    assert refused.value.remedy
    return refused.value


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def a_listener() -> Iterator[tuple[socket.socket, str]]:
    """Something that takes connections, and its address as a node's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/p2p/{WANTED}"


async def answer_all(server: socket.socket, greeting: bytes, *, hang_up: bool) -> None:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(server.dup()))

    async def answer(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # whoever has read enough hangs up
            await stream.send_all(greeting)
            while await stream.receive_some() and not hang_up:
                pass

    await trio.serve_listeners(answer, [listener])


async def test_the_port_is_wrong() -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{WANTED}"
    error = await refusal(address)
    assert error.code == "nothing_listens"
    assert f"nothing listens at {address.partition('/p2p/')[0]} (connection refused)" in error.message
    assert "4001" in error.remedy


async def test_the_name_is_wrong() -> None:
    error = await refusal(f"/dns4/nowhere.invalid/tcp/4001/p2p/{WANTED}")
    assert (error.code, "nowhere.invalid" in error.message) == ("unknown_host", True)
    assert "spelling" in error.remedy


async def test_the_peer_id_is_wrong_and_the_remedy_right() -> None:
    async with open_overlay(config(1)) as node:
        place = node.addrs[0].partition("/p2p/")[0]
        error = await refusal(f"{place}/p2p/{WANTED}")
        assert error.code == "wrong_peer"
        assert f"is {node.peer_id}, not {WANTED}" in error.message
        assert f"give {place}/p2p/{node.peer_id}." in error.remedy
        async with visit(DhtSettings(bootstrap=(f"{place}/p2p/{node.peer_id}",))) as us:
            assert us.connected_peers() == (node.peer_id,)


@pytest.mark.parametrize(
    ("greeting", "code", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_libp2p", 'is no azu node: it says "SSH-2.0-OpenSSH_9.2"'),
        (b"\x1b[2J\x07 bell", "not_libp2p", "\\x1b[2J\\x07"),
        (b"", "silent", "takes connections, and does not answer as an azu node does"),
    ],
)
async def test_another_program_listens_there(greeting: bytes, code: str, words: str) -> None:
    with a_listener() as (server, address):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: answer_all(server, greeting, hang_up=True))
            error = await refusal(address)
            nursery.cancel_scope.cancel()
    assert (error.code, words in error.message, error.message.isprintable()) == (code, True, True)
    assert "Check the port" in error.remedy


async def test_something_listens_there_that_never_says_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(diagnosis, "_HELLO_SECONDS", 0.3)
    with a_listener() as (_, address):
        error = await refusal(address)
    assert (error.code, "takes connections, and does not answer" in error.message) == ("silent", True)


async def test_a_peer_that_serves_no_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit_module, "SECOND_TRY_SECONDS", 0.3)
    async with open_overlay(config(1, server=False)) as peer:
        error = await refusal(peer.addrs[0])
    assert (error.code, error.message) == ("no_dht", f"{peer.peer_id} answers, but serves no DHT")
    assert "address of a bootstrap node" in error.remedy


async def test_a_private_swarm(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.key", tmp_path / "ours.key"
    for path in (theirs, ours):
        write_new_swarm_key(path)
    async with open_overlay(config(1, swarm_key=read_swarm_key(theirs))) as node:
        error = await refusal(node.addrs[0])
        assert (error.code, "with --swarm-key" in error.remedy) == ("private_swarm", True)
        error = await refusal(node.addrs[0], swarm_key=ours)
        assert (error.code, "swarm key" in error.message) == ("handshake_failed", True)
        assert "Compare the file of --swarm-key" in error.remedy
        async with visit(DhtSettings(bootstrap=node.addrs[:1], swarm_key=theirs)) as us:
            assert us.connected_peers() == (node.peer_id,)


async def test_several_addresses_are_told_one_by_one() -> None:
    closed = f"/ip4/127.0.0.1/tcp/{free_port()}"
    unknown = "/dns4/nowhere.invalid/tcp/4001"
    error = await refusal(f"{closed}/p2p/{WANTED}", f"{unknown}/p2p/{WANTED}")
    assert error.code == "bootstrap_unreachable"
    assert error.message.index(closed) < error.message.index(unknown)
    assert "4001" in error.remedy
    assert "spelling" in error.remedy


async def test_one_good_address_is_enough_and_is_found_again() -> None:
    async with a_swarm() as swarm:
        closed = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{WANTED}"
        settings = DhtSettings(bootstrap=(closed, swarm.address))
        async with visit(settings) as us:
            await us.disconnect(swarm.meeting_point.peer_id)
            assert us.connected_peers() == ()
            await rejoin(us, settings)
            assert us.connected_peers() == (swarm.meeting_point.peer_id,)


async def test_a_trace_begins_with_who_let_us_in() -> None:
    now = int(time.time())
    async with a_swarm(worker(1, now=now, addrs=()), worker(2, now=now, addrs=())) as swarm:
        closed = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{WANTED}"
        settings = DhtSettings(bootstrap=(closed, swarm.address))
        async with visit(settings) as us:
            assert entrances(us, settings) == [swarm.meeting_point.peer_id]
            trace = await us.trace(b"any key", seeds=entrances(us, settings))
            assert [hop.named_by for hop in trace.hops] == [None, *[swarm.meeting_point.peer_id] * 2]
            assert trace.hops[0].peer_id == swarm.meeting_point.peer_id
            as_member = await us.trace(b"any key")
            assert {hop.named_by for hop in as_member.hops} == {None}, "it knows them all by now"
            assert {hop.peer_id for hop in as_member.hops} >= {hop.peer_id for hop in trace.hops}


async def test_a_listener_that_floods_is_not_read_for_ever() -> None:
    flood = b"x" * (1 << 24)
    with a_listener() as (server, address):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: answer_all(server, flood, hang_up=False))
            error = await refusal(address)
            nursery.cancel_scope.cancel()
    assert error.code == "not_libp2p"
    assert len(error.message) < 400
