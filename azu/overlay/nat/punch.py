"""A direct connection out of a relayed one: both ends dial each other at the same time (DCUtR).

https://github.com/libp2p/specs/blob/master/relay/DCUtR.md. Both routers then see a connection going out, and let the
other's packets in. Both dials leave from the port that this node listens on, since the mapping that the router made for
it is the address that others were told. Where both SYNs cross, TCP makes one connection out of two dials, of which the
handshake's roles are therefore fixed: who was dialled through the relay begins the exchange, and answers in Noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from azu.errors import AzuError, ProtocolError
from azu.logs import log
from azu.overlay.faults import mapped
from azu.overlay.nat.dialing import DirectDials, is_public
from azu.overlay.nat.messages import decode_addresses, encode_addresses, read_message, write_message
from azu.overlay.streams import OverlayStream

__all__ = ["DCUTR", "Puncher"]

logger = logging.getLogger(__name__)

DCUTR = "/libp2p/dcutr"
_ATTEMPTS = 3
_AGAIN_SECONDS = 60.0  # then one more, for as long as the relayed connection lasts: a router may have been restarted
_DIAL_SECONDS = 4.0  # one attempt; a lost SYN is sent again after 1 s
_MESSAGE_SECONDS = 5.0
_LONGEST_RTT = 4.0  # seconds, of a relayed round trip that is believed
_MAX_UPGRADES = 1_024  # peers that are remembered
_MAX_BEGUN = 16  # at once: who comes through a relay may be many, and tell us where to dial
_MAX_DIALLED = 4  # addresses of one attempt


@dataclass(slots=True)
class _Upgrade:
    """What becomes of a relayed connection. attempts: of the other end's that we still take part in at any time, and
    `next_at` when we take part in one more; never where the other end dialled.
    """

    attempts: int
    settled: trio.Event
    next_at: float


class Puncher:
    """Turns relayed connections into direct ones.

    Args:
        candidates: where the world sees the port that this node listens on; empty where that is not known, or differs
            for each destination.
    """

    def __init__(self, dials: DirectDials, candidates: Callable[[], Sequence[str]]) -> None:
        self._dials = dials
        self._candidates = candidates
        self._upgrades: dict[str, _Upgrade] = {}
        self._begun = trio.Semaphore(_MAX_BEGUN)

    async def settled(self, peer_id: str, seconds: float) -> None:
        """Wait until it has turned out whether there is a direct connection to a peer that was dialled by relay.

        Not for long where the peer cannot punch holes; and it may just dial us, which begins no exchange.
        """
        if (upgrade := self._upgrades.get(peer_id)) is None or upgrade.settled.is_set():
            return
        with trio.move_on_after(seconds):
            spoken = await self._dials.identified(peer_id)
            if DCUTR in spoken or not spoken:
                while not (upgrade.settled.is_set() or self._dials.is_direct(peer_id)):  # noqa: ASYNC110 - the swarm has no event
                    await trio.sleep(0.02)
        upgrade.settled.set()  # whether it has come about or not: the next stream does not wait for it again

    def expect(self, peer_id: str) -> None:
        """Note that we dial a peer by relay, and that it may make a direct connection of that."""
        self._note(peer_id, _ATTEMPTS, trio.current_time())

    def _note(self, peer_id: str, attempts: int, next_at: float) -> None:
        known = self._upgrades.get(peer_id)
        if known is not None and not known.settled.is_set():
            known.attempts = max(known.attempts, attempts)
            known.next_at = min(known.next_at, next_at)
            return
        if len(self._upgrades) >= _MAX_UPGRADES:
            self._upgrades.clear()
        self._upgrades[peer_id] = _Upgrade(attempts, trio.Event(), next_at)

    async def begin(self, peer_id: str) -> None:
        """The dialled side: upgrade a relayed connection that has come in. Ends when that is done, or of no use."""
        self._note(peer_id, 0, math.inf)
        attempts = _ATTEMPTS
        while not await self._try(peer_id, attempts):
            await trio.sleep(_AGAIN_SECONDS)
            attempts = 1

    async def _try(self, peer_id: str, attempts: int) -> bool:
        """So many attempts; whether more would be of no use. Never raises."""
        if self._dials.is_direct(peer_id):
            return True
        try:
            async with self._begun:
                spoken = await self._dials.identified(peer_id)
                if await self._dial_back(peer_id) or (spoken and DCUTR not in spoken):
                    return True
                for _ in range(attempts):  # on a stream each, as go-libp2p wants it
                    async with await self._dials.open_stream(peer_id, DCUTR) as stream:
                        if await self._attempt(stream):
                            return True
        except (AzuError, trio.TooSlowError) as error:
            log(logger, logging.DEBUG, "no hole punched", peer=peer_id, reason=str(error))
        finally:
            self._settle(peer_id)
        return False

    async def _attempt(self, stream: OverlayStream) -> bool:
        """One of the dialled side's; whether another would be of no use."""
        with trio.fail_after(_MESSAGE_SECONDS):
            theirs, rtt = await self._exchange(stream)
        if not theirs or not self._candidates():
            return True
        await write_message(stream, HolePunch(type=HolePunch.SYNC))
        await trio.sleep(min(rtt, _LONGEST_RTT) / 2)
        return await self._dial(stream.peer_id, theirs, self._dials.connect_as_responder)

    async def handle(self, stream: OverlayStream) -> None:
        """The dialling side: take part in the other end's attempts, on this stream or (as go-libp2p does) on others."""
        try:
            while self._is_wanted(stream):
                theirs = await self._asked(stream)
                if not self._use_attempt(stream):
                    return
                with self._dials.expecting(stream.peer_id, theirs):
                    if not await self._agree(stream, theirs):
                        return
                    if await self._dial(stream.peer_id, theirs, self._dials.connect):
                        return
        finally:
            self._settle(stream.peer_id)

    def _is_wanted(self, stream: OverlayStream) -> bool:
        """Only with whom we dialled, and seldom: nobody shall make us dial whom they like."""
        upgrade = self._upgrades.get(stream.peer_id)
        has_attempts = upgrade is not None and (upgrade.attempts > 0 or trio.current_time() >= upgrade.next_at)
        return has_attempts and stream.is_relayed and not self._dials.is_direct(stream.peer_id)

    def _use_attempt(self, stream: OverlayStream) -> bool:
        """Count one; whether there was one left, which others of the peer's streams may have used up."""
        if not self._is_wanted(stream):
            return False
        upgrade = self._upgrades[stream.peer_id]
        upgrade.attempts -= 1
        upgrade.next_at = trio.current_time() + _AGAIN_SECONDS / 2  # theirs is not our clock
        return True

    async def _asked(self, stream: OverlayStream) -> list[str]:
        with mapped(f"hear {stream.peer_id}'s addresses"), trio.fail_after(_MESSAGE_SECONDS):
            return _addresses_of(await read_message(stream, HolePunch))

    async def _agree(self, stream: OverlayStream, theirs: Sequence[str]) -> bool:
        """Wait for the time to dial; whether it has come, or a hole cannot be punched."""
        with mapped(f"agree with {stream.peer_id} on a time"), trio.fail_after(_MESSAGE_SECONDS):
            await write_message(stream, self._offer())
            if not theirs or not self._candidates():
                return False
            if (await read_message(stream, HolePunch)).type != HolePunch.SYNC:
                raise ProtocolError("something else than SYNC", code="bad_message")
        return True

    async def _dial_back(self, peer_id: str) -> bool:
        """Where the other end is reachable after all, no hole is needed."""
        return await self._dial(peer_id, self._dials.public_addresses(peer_id)[:_MAX_DIALLED], self._dials.connect)

    async def _exchange(self, stream: OverlayStream) -> tuple[list[str], float]:
        """The other end's addresses, and the round-trip time through the relay in seconds."""
        asked_at = trio.current_time()
        await write_message(stream, self._offer())
        answer = await read_message(stream, HolePunch)
        return _addresses_of(answer), trio.current_time() - asked_at

    def _offer(self) -> HolePunch:
        return HolePunch(type=HolePunch.CONNECT, ObsAddrs=encode_addresses(self._candidates()))

    async def _dial(self, peer_id: str, addresses: Sequence[str], dial: Callable[[str, str], Awaitable[None]]) -> bool:
        """Dial all of them at once until there is a direct connection, ours or the other end's."""
        if not addresses:
            return self._dials.is_direct(peer_id)

        async def attempt(address: str) -> None:
            try:
                await dial(peer_id, address)
            except Exception as error:  # libp2p raises a dozen types; another address may do
                log(logger, logging.DEBUG, "hole punching", peer=peer_id, address=address, reason=repr(error))

        with trio.move_on_after(_DIAL_SECONDS):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(attempt, address)
                while not self._dials.is_direct(peer_id):  # noqa: ASYNC110 - the swarm has no event for it
                    await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
        return self._dials.is_direct(peer_id)

    def _settle(self, peer_id: str) -> None:
        if (upgrade := self._upgrades.get(peer_id)) is not None:
            upgrade.settled.set()


def _addresses_of(message: HolePunch) -> list[str]:
    if message.type != HolePunch.CONNECT:
        raise ProtocolError("something else than CONNECT", code="bad_message")
    return [each for each in decode_addresses(message.ObsAddrs) if is_public(each)][:_MAX_DIALLED]
