"""The coordinator's view of the swarm: found in the DHT, kept fresh by asking each worker."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import trio

from azu.channel import Channel
from azu.dialing import open_worker_stream
from azu.errors import AzuError
from azu.logs import log
from azu.overlay import Overlay
from azu.records import WORKERS_KEY, WorkerRecord, is_live, open_worker_record
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, Accepted, Assign, GetStatus, Message, Status

__all__ = ["SwarmView"]

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_DISCOVER_S = 3.0
_ASK_S = 5.0
# Provider records outlive their peers by up to 48 hours: who does not answer is asked more and more seldom.
_FIRST_PAUSE_S = 2.0
_LAST_PAUSE_S = 300.0


@dataclass(slots=True)
class _Contact:
    """A peer that the DHT named as a worker."""

    record: WorkerRecord | None = None
    pause: float = 0.0
    next_try: float = 0.0
    asking: bool = False


class SwarmView:
    """Live workers by peer id. `run()` keeps it fresh."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._contacts: dict[str, _Contact] = {}
        self.changed = trio.Condition()

    def workers(self) -> tuple[WorkerRecord, ...]:
        """The newest records of workers that are alive, as they signed them."""
        now = time.time()
        records = (contact.record for contact in self._contacts.values())
        return tuple(record for record in records if record is not None and is_live(record, now))

    def drop(self, peer_id: str) -> None:
        """Forget a worker that failed a job, until it answers again."""
        if (contact := self._contacts.get(peer_id)) is not None:
            contact.record = None

    async def run(self) -> None:
        """Discover and poll until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discover)
            while True:
                for peer_id, contact in self._contacts.items():
                    if not contact.asking and trio.current_time() >= contact.next_try:
                        contact.asking = True
                        nursery.start_soon(self._poll, peer_id, contact)
                await trio.sleep(_POLL_S)

    async def assign(self, peer_id: str, envelope: bytes) -> None:
        """Hand a signed assignment to a worker.

        Raises:
            RefusedError: the worker says no. NetworkError: it does not answer.
        """
        await self._ask(peer_id, Assign(), envelope, Accepted)

    async def _discover(self) -> None:
        while True:
            for peer_id in await self._overlay.providers(WORKERS_KEY):
                self._contacts.setdefault(peer_id, _Contact())
            await trio.sleep(_DISCOVER_S)

    async def _poll(self, peer_id: str, contact: _Contact) -> None:
        try:
            body = await self._ask(peer_id, GetStatus(), b"", Status)
            record = open_worker_record(bytes(body))
            if record.peer_id == peer_id:
                await self._keep(contact, record)
        except (AzuError, trio.TooSlowError) as error:
            if contact.record is not None:
                log(logger, logging.INFO, "worker lost", peer=peer_id, reason=str(error) or "no answer")
            contact.record = None
            contact.pause = min(max(contact.pause * 2, _FIRST_PAUSE_S), _LAST_PAUSE_S)
            contact.next_try = trio.current_time() + contact.pause
        finally:
            contact.asking = False

    async def _keep(self, contact: _Contact, record: WorkerRecord) -> None:
        if contact.record is None:
            log(logger, logging.INFO, "worker found", peer=record.peer_id, device=record.device)
        contact.record, contact.pause = record, 0.0
        async with self.changed:
            self.changed.notify_all()

    async def _ask(self, peer_id: str, question: Message, body: bytes, answer: type[Message]) -> bytearray:
        with trio.fail_after(_ASK_S):
            async with await open_worker_stream(self._overlay, peer_id, CONTROL_PROTOCOL) as stream:
                channel = Channel(stream, CONTROL)
                await channel.send(question, body)
                return (await channel.expect(answer))[1]
