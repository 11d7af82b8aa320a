"""Who is closed for a newcomer where a node is full: never one that is of use, and those of a flood first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import NetworkError
from azu.overlay import Overlay, RelayLimits, open_overlay, opening, room
from azu.overlay.room import IDLE_SECONDS, Occupant, least_useful
from tests.overlay.conftest import LIMIT, config, echo, receive_exactly

ORIGINS = ("25.1.1.0/24", "25.2.2.0/24", "2a00:1:2::/48", "a relay")
IDLE = Occupant(ORIGINS[0], IDLE_SECONDS, is_busy=False, is_inbound=True, is_kept=False)

occupants = st.lists(
    st.builds(
        Occupant,
        origin=st.sampled_from(ORIGINS),
        idle=st.floats(0, 3 * IDLE_SECONDS),
        is_busy=st.booleans(),
        is_inbound=st.booleans(),
        is_kept=st.booleans(),
    ),
    max_size=30,
)
newcomers = st.sampled_from([None, *ORIGINS, "25.3.3.0/24"])


def is_of_use(each: Occupant) -> bool:
    return each.is_busy or each.is_kept or not each.is_inbound or each.idle < IDLE_SECONDS


@given(occupants, newcomers)
def test_nobody_of_use_goes(everybody: list[Occupant], newcomer: str | None) -> None:
    index = least_useful(everybody, newcomer)
    assert index is None or not is_of_use(everybody[index])


@given(occupants, newcomers)
def test_the_most_numerous_go_first_and_among_those_the_idlest(everybody: list[Occupant], newcomer: str | None) -> None:
    index = least_useful(everybody, newcomer)
    held = Counter(each.origin for each in everybody)
    idle = [each for each in everybody if not is_of_use(each)]
    most = max((held[each.origin] for each in idle), default=0)
    if index is None:
        assert most == 0 or (newcomer is not None and most < held[newcomer])
    else:
        assert held[everybody[index].origin] == most
        assert everybody[index].idle == max(each.idle for each in idle if held[each.origin] == most)


@given(occupants, newcomers)
def test_our_own_dials_find_a_place_wherever_there_is_one(everybody: list[Occupant], newcomer: str | None) -> None:
    if least_useful(everybody, newcomer) is not None:
        assert least_useful(everybody, None) is not None


@given(st.integers(3, 32), st.integers(2, 20), st.lists(st.booleans(), max_size=60))
def test_a_flood_makes_room_and_drives_nobody_out(each_holds: int, subnets: int, is_honest: list[bool]) -> None:
    """An attacker's addresses have filled the node. Who comes honestly gets in, and who was there before stays."""
    honest = [replace(IDLE, origin=f"26.0.{number}.0/24", idle=9_999.0) for number in range(8)]
    flood = [replace(IDLE, origin=f"25.0.{number}.0/24") for number in range(subnets) for _ in range(each_holds)]
    there = [*honest, *flood]
    is_honest = is_honest[: subnets * (each_holds - 1)]  # so many, until no subnet of it holds more than an honest one
    for number, honestly in enumerate(is_honest):
        newcomer = replace(IDLE, origin=f"27.0.{number}.0/24" if honestly else "25.0.0.0/24", idle=0.0)
        index = least_useful(there, newcomer.origin)
        if index is not None:
            assert there[index] not in honest
            there[index] = newcomer
    assert sum(each.origin.startswith("27.") for each in there) == sum(is_honest)


# --- a real node with few places


async def connect(node: Overlay, server: Overlay) -> None:
    await node.connect(server.peer_id, server.addrs)
    while not server.is_connected(node.peer_id):
        await trio.sleep(0.01)


async def test_a_full_node_lets_newcomers_in_and_keeps_who_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(room, "IDLE_SECONDS", 0.0)
    with trio.fail_after(LIMIT):
        async with (
            open_overlay(replace(config(1), relay=RelayLimits())) as server,
            open_overlay(config(2, server=False)) as busy,
            open_overlay(config(3)) as neighbour,
            open_overlay(config(4, server=False)) as reserved,
            open_overlay(config(5, server=False)) as first,
            open_overlay(config(6, server=False)) as second,
        ):
            server.handle("/test/echo", echo)
            stream = await busy.open_stream(server.peer_id, "/test/echo", addrs=server.addrs)
            await neighbour.bootstrap(server.addrs)
            while not server.statistics().routing_table:
                await trio.sleep(0.01)
            await connect(reserved, server)
            await reserved._traversal._circuits.reserve(server.peer_id)
            await connect(first, server)
            assert server.statistics().connections == 4

            await connect(second, server)
            while server.is_connected(first.peer_id) or first.is_connected(server.peer_id):
                await trio.sleep(0.01)
            assert server.statistics().evicted == 1

            monkeypatch.setattr(room, "IDLE_SECONDS", 1_000.0)
            with pytest.raises(NetworkError):
                await first.connect(server.peer_id, server.addrs)
            with pytest.raises(NetworkError):
                await server.connect(first.peer_id, first.addrs)
            assert server.is_connected(second.peer_id)

            monkeypatch.setattr(room, "IDLE_SECONDS", 0.0)
            await server.connect(first.peer_id, first.addrs)  # nor is a full node cut off from others
            while server.is_connected(second.peer_id):
                await trio.sleep(0.01)
            with pytest.raises(NetworkError):
                await second.connect(server.peer_id, server.addrs)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
            await stream.aclose()
            assert set(server.connected_peers()) == {each.peer_id for each in (busy, neighbour, reserved, first)}
            assert server.statistics().evicted == 2
