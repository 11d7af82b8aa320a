"""Jobs that wait for room: in fair turns, with no room lost and none given twice, whoever leaves and whenever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from azu.errors import CapacityError
from azu.tickets import Sampling
from coordinator.admission import Admission, Grant
from coordinator.generation import GenerationRequest, ServedModel
from tests.distribution.nodes import manifest_of

MODEL = ServedModel(manifest_of(b"0"), {}, {}, 0)


def request(tokens: int, account: str = "") -> GenerationRequest:
    return GenerationRequest(MODEL, (1,), tokens - 1, Sampling(), (), account)


@dataclass
class Room:
    """So many positions; what `Admission` asks for room."""

    size: int
    used: int = 0
    asked: int = 0
    largest: int = 1_000
    order: list[str] = field(default_factory=list)

    def find(self, asked: GenerationRequest) -> Grant | None:
        self.asked += 1
        tokens = len(asked.prompt) + asked.max_tokens
        if self.used + tokens > self.size:
            return None
        self.used += tokens
        self.order.append(asked.account)
        return Grant((), "float32", tokens)

    def refuse(self, asked: GenerationRequest) -> CapacityError | None:
        tokens = len(asked.prompt) + asked.max_tokens
        return CapacityError("never", code="too_large") if tokens > self.largest else None

    def free(self, grant: Grant) -> None:
        self.used -= grant.tokens
        assert self.used >= 0, "room was given back twice"


def admission_over(room: Room) -> Admission:
    return Admission(room.find, room.refuse, room.free)


async def test_room_goes_to_accounts_in_turn(autojump_clock: trio.testing.MockClock) -> None:
    room = Room(10)
    admission = admission_over(room)

    async def job(account: str) -> None:
        grant = await admission.admit(request(10, account), trio.current_time() + 100)
        await trio.sleep(1)
        admission.release(grant)

    async with trio.open_nursery() as nursery:
        for account in "aaaabb":
            nursery.start_soon(job, account)
            await trio.testing.wait_all_tasks_blocked()
    assert "".join(room.order) == "aababa"  # the first had to wait for nobody, and owes nobody anything
    assert room.used == 0


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_who_leaves_in_the_turn_in_which_it_is_let_in_passes_its_room_on(
    autojump_clock: trio.testing.MockClock, cancelled_first: bool
) -> None:
    room = Room(10)
    admission = admission_over(room)
    first = await admission.admit(request(10), 100.0)
    scope = trio.CancelScope()
    let_in: list[Grant] = []

    async def leaves() -> None:
        with scope:
            grant = await admission.admit(request(10, "leaves"), 100.0)
            try:
                await trio.sleep_forever()
            finally:
                admission.release(grant)

    async def stays() -> None:
        let_in.append(await admission.admit(request(10, "stays"), 100.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaves)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(stays)
        await trio.testing.wait_all_tasks_blocked()
        if cancelled_first:
            scope.cancel()
        admission.release(first)
        scope.cancel()
    assert scope.cancelled_caught
    assert len(let_in) == 1
    assert room.used == 10
    assert room.order == ["", "leaves", "stays"]


async def test_who_waited_in_vain_is_told_when_to_try_again(autojump_clock: trio.testing.MockClock) -> None:
    room = Room(10)
    admission = admission_over(room)

    async def job() -> None:
        grant = await admission.admit(request(10), trio.current_time() + 1_000)
        await trio.sleep(20)
        admission.release(grant)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(job)
        await trio.sleep(50)  # two were let in after they had waited, 20 s after one another
        with pytest.raises(CapacityError) as caught:
            await admission.admit(request(10, "other"), trio.current_time() + 5)
        assert caught.value.code == "no_capacity"
        assert caught.value.retry_after_s == pytest.approx(20.0)
        before = trio.current_time()
        with pytest.raises(CapacityError):
            await admission.admit(request(10), trio.current_time())
        assert trio.current_time() == before
        assert len(room.order) == 3


async def test_what_never_fits_is_refused_at_once_or_as_soon_as_it_shows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    room = Room(10, largest=20)
    admission = admission_over(room)
    await admission.admit(request(10), 100.0)
    with pytest.raises(CapacityError, match="never"):
        await admission.admit(request(21), 100.0)
    assert trio.current_time() < 0.1
    with pytest.RaisesGroup(CapacityError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(admission.admit, request(15), 100.0)
            await trio.sleep(10)
            room.largest = 12  # a worker has gone
    assert 10 <= trio.current_time() < 12


async def test_a_full_queue_takes_a_place_from_who_has_the_most(autojump_clock: trio.testing.MockClock) -> None:
    room = Room(10)
    admission = admission_over(room)
    grant = await admission.admit(request(10), 100.0)
    dropped = 0

    async def job() -> None:
        nonlocal dropped
        try:
            grant = await admission.admit(request(10, "many"), 1_000.0)
        except CapacityError:
            dropped += 1
        else:
            await trio.sleep(1)
            admission.release(grant)

    async with trio.open_nursery() as nursery:
        for _ in range(256):
            nursery.start_soon(job)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CapacityError):
            await admission.admit(request(10, "many"), 100.0)
        nursery.start_soon(admission.admit, request(10, "one"), 1_000.0)
        await trio.testing.wait_all_tasks_blocked()
        assert dropped == 1
        admission.release(grant)
        await trio.sleep(2.5)
        assert room.order == ["", "many", "one"]
        nursery.cancel_scope.cancel()


async def test_a_crowd_does_not_ask_for_the_same_room_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    """Looking for room takes milliseconds in a large swarm: once for all that are as large, until something changes."""
    room = Room(10)
    admission = admission_over(room)
    await admission.admit(request(10), 100.0)
    async with trio.open_nursery() as nursery:
        for tokens in range(100):
            nursery.start_soon(admission.admit, request(10 + tokens, str(tokens)), 100.0)
        await trio.sleep(4.5)
        assert room.asked < 120  # not a hundred for each of them, nor a hundred a second
        nursery.cancel_scope.cancel()
