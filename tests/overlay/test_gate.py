"""Who is let in, and that a flood of connections, streams or bytes leaves honest peers served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import NetworkError, ProtocolError
from azu.overlay import Overlay, OverlayStream
from azu.overlay.gate import Gate, GateLimits, Ticket

SECOND = "25.1.2.3"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def admitted(gate: Gate, host: str, *, established: bool = True) -> Ticket | None:
    """Let a connection in that stays."""
    ticket = gate.admit(host)
    if ticket is not None:
        ticket.__enter__()
        if established:
            ticket.established()
    return ticket


@pytest.mark.parametrize(
    ("hosts", "limits", "count"),
    [
        (["25.1.2.3"], GateLimits(per_address=5), 5),
        (["2a00:1:2:3::1", "2a00:1:2:3:4::1"], GateLimits(per_address=5), 5),  # one customer has a /64
        (["::ffff:25.1.2.3", "25.1.2.3"], GateLimits(per_address=5), 5),
        (["25.1.2.3", "25.1.2.4", "25.1.2.200"], GateLimits(per_address=5, per_subnet=7), 7),
        (["2a00:1:2:3::1", "2a00:1:2:4::1"], GateLimits(per_address=5, per_subnet=7), 7),  # and one site a /48
        (["25.1.2.3", "25.1.3.3"], GateLimits(per_address=5, per_subnet=7), 10),
        (["25.1.2.3"], GateLimits(burst=6), 6),
        (["127.0.0.1", "192.168.1.1", "fe80::1%eth0"], GateLimits(per_address=1, per_subnet=1, burst=1), 40),
    ],
)
def test_an_address_and_its_subnet_get_so_many(hosts: Sequence[str], limits: GateLimits, count: int) -> None:
    gate = Gate(Clock(), limits)
    tickets = [admitted(gate, hosts[number % len(hosts)]) for number in range(40)]
    assert sum(ticket is not None for ticket in tickets) == count
    assert gate.refused == 40 - count


def test_a_connection_that_ends_makes_room() -> None:
    gate = Gate(Clock(), GateLimits(per_address=1))
    ticket = admitted(gate, SECOND)
    assert ticket is not None
    assert gate.admit(SECOND) is None
    ticket.__exit__(None, None, None)
    assert gate.admit(SECOND) is not None


def test_new_connections_come_back_with_time() -> None:
    clock = Clock()
    gate = Gate(clock, GateLimits(burst=2, per_second=0.5))
    assert [gate.admit(SECOND) is not None for _ in range(3)] == [True, True, False]
    clock.now += 2
    assert [gate.admit(SECOND) is not None for _ in range(2)] == [True, False]


def test_a_flood_of_unfinished_handshakes_shuts_out_the_flood_only() -> None:
    gate = Gate(Clock(), GateLimits(unfinished=10, unfinished_per_address=4))
    for number in range(100):
        admitted(gate, f"25.{number % 5}.0.1", established=False)
    assert admitted(gate, "25.9.0.1")
    assert admitted(gate, "127.0.0.1", established=False)
    for number in range(100):  # and nobody gets more than twice the places
        admitted(gate, f"26.{number}.0.1", established=False)
    assert sum(gate._unfinished.values()) == 20


@given(
    st.lists(st.tuples(st.sampled_from(["25.1.2.3", "25.1.2.4", "25.9.9.9", "127.0.0.1"]), st.booleans()), max_size=60)
)
def test_the_books_are_empty_when_all_have_left(steps: list[tuple[str, bool]]) -> None:
    gate = Gate(Clock(), GateLimits(per_address=4, per_subnet=6, unfinished=8))
    with ExitStack() as stack:
        for host, is_established in steps:
            ticket = gate.admit(host)
            if ticket is not None:
                stack.enter_context(ticket)
                if is_established:
                    ticket.established()
    assert gate._live == Counter()
    assert gate._unfinished == Counter()


def test_who_breaks_protocols_is_banned_for_longer_each_time() -> None:
    clock, limits = Clock(), GateLimits(violations=3, window=60, ban=100, longest_ban=300)
    gate = Gate(clock, limits)
    for seconds in (100, 200, 300, 300):
        assert [gate.violated("bad") for _ in range(3)] == [False, False, True]
        assert gate.ban_left("bad") == seconds
        assert gate.banned == ("bad",)
        assert not gate.violated("bad")  # what it still sends does not count
        clock.now += seconds
        assert gate.ban_left("bad") == 0
        assert gate.banned == ()
        clock.now += limits.window + 1


def test_seldom_violations_are_forgiven() -> None:
    clock = Clock()
    gate = Gate(clock, GateLimits(violations=3, window=60))
    for _ in range(20):
        assert not gate.violated("clumsy")
        clock.now += 31


def test_a_ban_is_not_pushed_out_by_strangers() -> None:
    gate = Gate(Clock(), GateLimits(violations=2))
    assert [gate.violated("bad") for _ in range(2)] == [False, True]
    for number in range(10_000):
        gate.violated(f"stranger {number}")
    assert gate.ban_left("bad") > 0
    assert len(gate._records) <= 4_096


# --- against a real node


async def test_a_peer_that_breaks_a_protocol_is_banned(pair: tuple[Overlay, Overlay]) -> None:
    server, client = pair

    async def refuse(stream: OverlayStream) -> None:
        await stream.receive_some(1)
        raise ProtocolError("nonsense", code="bad_message")

    server.handle("/test/strict", refuse)
    for _ in range(GateLimits().violations):
        async with await client.open_stream(server.peer_id, "/test/strict", addrs=server.addrs) as stream:
            await stream.send_all(b"x")
            with suppress(NetworkError):  # a reset
                assert await stream.receive_some() == b""
    while server.is_connected(client.peer_id) or client.is_connected(server.peer_id):
        await trio.sleep(0.01)
    assert server.statistics().banned == (client.peer_id,)
    with pytest.raises(NetworkError, match="banned for"):
        await server.connect(client.peer_id, client.addrs)
    with pytest.raises(NetworkError):
        await client.open_stream(server.peer_id, "/test/strict", addrs=server.addrs)
    assert not server.is_connected(client.peer_id)


async def test_our_own_failures_ban_nobody(pair: tuple[Overlay, Overlay]) -> None:
    server, _ = pair
    for _ in range(20):
        server.count_violation(server.peer_id)
    assert not server.statistics().violations
    assert not server.statistics().banned
