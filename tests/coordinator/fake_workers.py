"""Workers on real overlays that say and do what a test wants, and a swarm view that watches them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from azu.channel import Channel
from azu.crossings import NOTHING, token_crossing
from azu.identity import Identity
from azu.ledger import Ledger
from azu.overlay import Overlay, OverlayConfig, OverlayStream, open_overlay
from azu.records import VALIDATORS, WorkerRecord, sign_worker_record
from azu.tickets import JobTicket, Receipt, Sampling, open_ticket, sign_receipt
from azu.wire.messages import (
    CONTROL,
    CONTROL_PROTOCOL,
    JOB,
    JOB_PROTOCOL,
    End,
    Open,
    ReceiptReply,
    Refused,
    Status,
    Token,
)
from coordinator.generation import GenerationRequest, ServedModel
from coordinator.jobs import JobRunner
from coordinator.meter import Meter
from coordinator.swarm import SwarmView
from tests.distribution.nodes import manifest_of

LIMIT = 60.0
KV_TOKENS = 1_000
MANIFEST = manifest_of(*(bytes([number]) for number in range(4)))
COORDINATOR = Identity(bytes([99]) * 32)


@dataclass
class FakeWorker:
    """Claims layers [start, end); `script` plays its side of each job stream after the ticket."""

    identity: Identity
    overlay: Overlay
    start: int
    end: int
    script: Callable[[FakeWorker, Channel, JobTicket], Awaitable[None]]
    claims: dict[str, Any] = field(default_factory=dict)
    tickets: list[JobTicket] = field(default_factory=list)
    ended: int = 0  # jobs whose End came

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def record(self) -> bytes:
        now = int(time.time())
        fields: dict[str, Any] = {
            "peer_id": self.peer_id, "sequence": time.time_ns(), "issued_at": now, "expires_at": now + 60,
            "agent": "test", "protocols": (), "addrs": (), "device": "test", "dtype": "float32",
            "vram_total": 1, "vram_free": 0,
            "kv_tokens": KV_TOKENS, "kv_tokens_free": KV_TOKENS, "jobs": 0, "layer_us": 10, "payout_address": "",
            "ranges": [{"manifest": MANIFEST.digest, "start": self.start, "end": self.end, "state": "loaded"}],
        }  # fmt: skip
        return sign_worker_record(self.identity, WorkerRecord.model_validate(fields | self.claims))

    async def control(self, stream: OverlayStream) -> None:
        channel = Channel(stream, CONTROL)
        while await channel.receive() is not None:
            await channel.send(Status(), self.record())

    async def job(self, stream: OverlayStream) -> None:
        channel = Channel(stream, JOB)
        _, body = await channel.expect(Open)
        ticket = open_ticket(bytes(body))[1]
        self.tickets.append(ticket)
        await self.script(self, channel, ticket)

    async def until_end(self, channel: Channel, ticket: JobTicket) -> None:
        """Read until the coordinator ends the job, and answer with an honest receipt."""
        while (received := await channel.receive()) is not None:
            if isinstance(received[0], End):
                self.ended += 1
                await channel.send(
                    ReceiptReply(), sign_receipt(self.identity, self.receipt(ticket, received[0].tokens))
                )
                return

    def receipt(self, ticket: JobTicket, counted: int = 0) -> Receipt:
        """An honest one of a job with this module's prompt, in which the tokens 7, 8, 9, ... came."""
        stage, positions = ticket.stage_of(self.peer_id) or 0, ticket.positions(counted)
        tokens = range(7, 7 + counted)
        ran = [*prompt_of(ticket.prompt_tokens), *tokens][:positions]
        return Receipt(
            job_id=ticket.job_id, epoch=0, stage=stage, peer_id=self.peer_id,
            start=self.start, end=self.end, tokens=ticket.total_tokens - 1,
            received=NOTHING if stage else token_crossing(0, ran),
            sent=token_crossing(ticket.prompt_tokens, tokens) if stage == len(ticket.stages) - 1 else NOTHING,
            issued_at=int(time.time()),
        )  # fmt: skip


async def honest(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    """As the last stage sends the tokens 7, 8, 9, ...; takes the end."""
    if ticket.stages[-1].peer_id == worker.peer_id:
        for index in range(ticket.max_tokens):
            finish = "length" if index + 1 == ticket.max_tokens else ""
            await channel.send(Token.model_validate({"index": index, "token": 7 + index, "finish": finish}))
    await worker.until_end(channel, ticket)


async def idle(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
    """Never gives a token."""
    await worker.until_end(channel, ticket)


def refuses(code: str) -> Callable[[FakeWorker, Channel, JobTicket], Awaitable[None]]:
    async def refuse(worker: FakeWorker, channel: Channel, ticket: JobTicket) -> None:
        await channel.send(Refused(code=code, message="no"))

    return refuse


@dataclass
class Swarm:
    """The coordinator's side, and the workers that it watches."""

    overlay: Overlay
    view: SwarmView
    runner: JobRunner
    workers: list[FakeWorker]

    async def ask(self, max_tokens: int = 3, prompt: int = 4) -> list[int]:
        """The tokens of one job."""
        async with self.runner.generate(request(max_tokens, prompt)) as job:
            return [sampled.token async for sampled in job.tokens()]


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple(range(3, 3 + length))


def request(max_tokens: int = 3, prompt: int = 4) -> GenerationRequest:
    model = ServedModel(manifest=MANIFEST, tokenizer_files={}, config={}, created=0)
    return GenerationRequest(model, prompt_of(prompt), max_tokens, Sampling(), ())


@asynccontextmanager
async def opened(number: int) -> AsyncIterator[Overlay]:
    seed = bytes([number]) * 32
    async with open_overlay(OverlayConfig(seed, ("/ip4/127.0.0.1/tcp/0",), validators=VALIDATORS)) as overlay:
        yield overlay


Plan = tuple[int, int, Callable[[FakeWorker, Channel, JobTicket], Awaitable[None]]]


@asynccontextmanager
async def swarm_of(tmp_path: Path, *plans: Plan) -> AsyncIterator[Swarm]:
    """A coordinator's parts and one fake worker for each (start, end, script), all known and polled once."""
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            workers: list[FakeWorker] = []
            for number, (start, end, script) in enumerate(plans, 1):
                overlay = await stack.enter_async_context(opened(number))
                worker = FakeWorker(Identity(bytes([number]) * 32), overlay, start, end, script)
                overlay.handle(CONTROL_PROTOCOL, worker.control)
                overlay.handle(JOB_PROTOCOL, worker.job)
                workers.append(worker)
            me = await stack.enter_async_context(opened(99))
            view = SwarmView(me)
            for worker in workers:
                await me.connect(worker.peer_id, worker.overlay.addrs)
                view._meet(worker.peer_id)
            ledger = await stack.enter_async_context(Ledger.open(tmp_path / "ledger.sqlite3", currency="units"))
            runner = JobRunner(COORDINATOR, me, view, Meter(ledger), price=2)
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(view.run)
            while len(view.workers()) < len(workers):
                await trio.sleep(0.01)
            yield Swarm(me, view, runner, workers)
            nursery.cancel_scope.cancel()
