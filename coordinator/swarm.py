"""The coordinator's view of the swarm: found in the DHT, kept fresh by asking each worker."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from itertools import count

import trio

from azu.channel import Channel, RefusedError
from azu.dialing import open_worker_stream
from azu.errors import AzuError, ProtocolError, TrustError
from azu.logs import log
from azu.overlay import PROVIDER_SECONDS, Overlay
from azu.records import WORKERS_KEY, WorkerRecord, is_live, open_worker_record
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, LEAVING, Accepted, Assign, GetStatus, Message, Status
from coordinator.usual import Usual

__all__ = ["SwarmView"]

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_ASKS_PER_S = 50  # a swarm of thousands is asked in turns: 1,250 workers every 25 s, and one that died is noticed in 30
_DISCOVER_S = 3.0
_THOROUGH_EVERY = 5  # look-ups of which one asks every peer that holds announcements
_ASK_S = 5.0
# Provider records outlive their peers: who does not answer is asked more and more seldom, and forgotten once nobody
# names it any more. One that did answer may come back; a stranger may never have existed.
_FIRST_PAUSE_S = 2.0
_LAST_PAUSE_S, _STRANGERS_LAST_PAUSE_S = 30.0, 300.0
# Anybody can name any number of peers as workers. So many are remembered, and of those that never answered so many are
# asked at a time, which leaves the real ones alone.
_MAX_CONTACTS = 4_096
_MAX_STRANGERS = 64
# A fault of weight 1 is held against a worker for this long, and at most _MAX_FAULTS of them.
_FORGIVE_S = 60.0
_MAX_FAULTS = 10


@dataclass(slots=True)
class _Contact:
    """A peer that the DHT named as a worker."""

    named_at: float
    record: WorkerRecord | None = None
    has_answered: bool = False
    pause: float = 0.0
    next_try: float = 0.0
    asking: bool = False
    faults: int = 0
    forgiven_at: float = 0.0
    usual: Usual = field(default_factory=Usual)


class SwarmView:
    """Live workers by peer id. `run()` keeps it fresh."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._contacts: dict[str, _Contact] = {}

    def workers(self) -> tuple[WorkerRecord, ...]:
        """The newest records of workers that are alive and stay, as they signed them."""
        now = time.time()
        records = (contact.record for contact in self._contacts.values())
        return tuple(record for record in records if record is not None and is_live(record, now) and not record.leaving)

    def record(self, peer_id: str) -> WorkerRecord | None:
        """A worker's newest record, whether or not it is about to leave."""
        contact = self._contacts.get(peer_id)
        return contact.record if contact is not None else None

    def note_leaving(self, peer_id: str) -> None:
        """A worker is about to leave: nothing is planned with it any more."""
        contact = self._contacts.get(peer_id)
        if contact is not None and contact.record is not None:
            contact.record = contact.record.model_copy(update={"leaving": True})

    def worker(self, peer_id: str) -> WorkerRecord | None:
        """The newest record of one worker, if it is alive."""
        contact = self._contacts.get(peer_id)
        record = contact.record if contact is not None else None
        return record if record is not None and is_live(record, time.time()) else None

    def usual(self, peer_id: str) -> Usual | None:
        """What is usual with one worker, if it is known at all."""
        contact = self._contacts.get(peer_id)
        return contact.usual if contact is not None else None

    def blame(self, peer_id: str, weight: int, error: AzuError) -> None:
        """Note a worker's part in a failed job: while there are others with fewer faults, they are preferred."""
        contact = self._contacts.get(peer_id)
        if contact is None:
            return
        if isinstance(error, RefusedError) and error.code == LEAVING:
            self.note_leaving(peer_id)
            return
        if isinstance(error, RefusedError) and error.code == "no_capacity":
            # No fault, only full: its next record says how full.
            if contact.record is not None:
                contact.record = contact.record.model_copy(update={"kv_tokens_free": 0})
            return
        if contact.record is not None and not self._overlay.is_connected(peer_id):
            contact.record = None  # it is gone; should it not be, the next poll brings it back
        contact.faults = min(self.faults(peer_id) + weight, _MAX_FAULTS)
        contact.forgiven_at = trio.current_time() + _FORGIVE_S * contact.faults

    def faults(self, peer_id: str) -> int:
        """What is held against a worker at this time."""
        contact = self._contacts.get(peer_id)
        return contact.faults if contact is not None and trio.current_time() < contact.forgiven_at else 0

    async def run(self) -> None:
        """Discover and poll until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discover)
            while True:
                for peer_id, contact in self._due():
                    contact.asking = True
                    nursery.start_soon(self._poll, peer_id, contact)
                await trio.sleep(_POLL_S)

    def _turn_s(self) -> float:
        """How long a worker that answers is left alone; nothing in a small swarm, where every tick asks all."""
        live = sum(contact.record is not None for contact in self._contacts.values())
        return max(0.0, live / _ASKS_PER_S - _POLL_S)

    def _due(self) -> list[tuple[str, _Contact]]:
        """Whom to ask now: every worker that answers, and of the others the newest first."""
        now = trio.current_time()
        asked = sum(contact.asking and contact.record is None for contact in self._contacts.values())
        due = [item for item in self._contacts.items() if not item[1].asking and now >= item[1].next_try]
        strangers = sorted((item for item in due if item[1].record is None), key=lambda item: item[1].pause)
        return [item for item in due if item[1].record is not None] + strangers[: max(0, _MAX_STRANGERS - asked)]

    async def assign(self, peer_id: str, envelope: bytes) -> None:
        """Hand a signed assignment to a worker.

        Raises:
            RefusedError: the worker says no. NetworkError: it does not answer.
        """
        await self._ask(peer_id, Assign(), envelope, Accepted)

    async def _discover(self) -> None:
        for turn in count():
            try:
                is_thorough = not turn % _THOROUGH_EVERY
                for peer_id in await self._overlay.providers(WORKERS_KEY, all_holders=is_thorough):
                    self._meet(peer_id)
                self._forget()
            except AzuError as error:
                log(logger, logging.DEBUG, "workers not looked up", reason=error.message)
            await trio.sleep(_DISCOVER_S)

    def _meet(self, peer_id: str) -> None:
        """Remember a peer, where there is no room in place of the one that has been silent for longest."""
        now = trio.current_time()
        if (known := self._contacts.get(peer_id)) is not None:
            known.named_at = now
            return
        if len(self._contacts) >= _MAX_CONTACTS:
            silent = [item for item in self._contacts.items() if item[1].pause and not item[1].asking]
            if not silent:
                return
            del self._contacts[max(silent, key=lambda item: item[1].pause)[0]]
        self._contacts[peer_id] = _Contact(now)

    def _forget(self) -> None:
        """Drop those that are silent and that nobody has named for as long as an announcement lives."""
        before = trio.current_time() - PROVIDER_SECONDS
        for peer_id, contact in list(self._contacts.items()):
            if contact.record is None and not contact.asking and contact.named_at < before:
                del self._contacts[peer_id]

    async def _poll(self, peer_id: str, contact: _Contact) -> None:
        asked_at = trio.current_time()
        try:
            record = open_worker_record(bytes(await self._ask(peer_id, GetStatus(), b"", Status)))
            if record.peer_id != peer_id:
                raise TrustError("it sent another worker's record", code="wrong_signer")
            if contact.record is None:
                log(logger, logging.INFO, "worker found", peer=peer_id, device=record.device)
            contact.record, contact.has_answered, contact.pause = record, True, 0.0
            now = trio.current_time()
            contact.usual.note(record, now - asked_at, now)
            contact.next_try = now + self._turn_s()
        except (AzuError, trio.TooSlowError) as error:
            if isinstance(error, ProtocolError | TrustError):
                self._overlay.count_violation(peer_id)
            if contact.record is not None:
                log(logger, logging.INFO, "worker lost", peer=peer_id, reason=str(error) or "no answer")
            contact.record = None
            longest = _LAST_PAUSE_S if contact.has_answered else _STRANGERS_LAST_PAUSE_S
            contact.pause = min(max(contact.pause * 2, _FIRST_PAUSE_S), longest)
            contact.next_try = trio.current_time() + contact.pause
        finally:
            contact.asking = False

    async def _ask(self, peer_id: str, question: Message, body: bytes, answer: type[Message]) -> bytearray:
        with trio.fail_after(_ASK_S):
            async with await open_worker_stream(self._overlay, peer_id, CONTROL_PROTOCOL) as stream:
                channel = Channel(stream, CONTROL)
                await channel.send(question, body)
                return (await channel.expect(answer))[1]
