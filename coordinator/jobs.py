"""Running jobs: admission, the ticket, one stream to each stage, tokens out, receipts in."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count

import trio

from azu.channel import Channel
from azu.errors import CapacityError, ProtocolError
from azu.identity import Identity
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.memory import first_positions
from azu.overlay import Overlay, OverlayStream
from azu.planning import Demand, Placement, WorkerView, links_of, views_for
from azu.tickets import MAX_SUCCESSORS, JobTicket
from azu.wire.messages import PACK, PACK_PROTOCOL, Nexts
from azu.wire.tensors import WeightFormat
from coordinator.admission import Admission, Grant
from coordinator.agreement import Handover
from coordinator.disputes import Disputes
from coordinator.generation import GenerationRequest, JobReport
from coordinator.hedging import Slow
from coordinator.job import RunningJob
from coordinator.meter import Meter
from coordinator.placement import layers_text, missing_layers
from coordinator.planning import Route, find_route
from coordinator.planning.moving import cache_seconds
from coordinator.relief import Relief
from coordinator.reserves import Accepts, Change, Reserves, find_others
from coordinator.room import Room
from coordinator.swarm import SwarmView

__all__ = ["JobRunner"]

logger = logging.getLogger(__name__)

# How long a request may wait for KV cache to become free.
_WAIT_S = 30.0
# Chains that are tried for a job which has not yet given a token.
_TRIES = 3
# Clients seldom use all the tokens that they may: no more are expected.
_EXPECTED_TOKENS = 256
# After a restart, workers of jobs that are taken up have this long to be found.
_FIND_S = 20.0
_LOOK_S = 0.1
# A ticket lives this long, and for this much longer per token: a bound on what an orphaned job can hold on to.
_TICKET_LIFE_S = 600
_TICKET_LIFE_PER_TOKEN_S = 2
_TICKET_MAX_LIFE_S = 86_400


class JobRunner:
    """Runs generations over the workers that the swarm view shows.

    Args:
        successors: the peer ids of who may go on with jobs when this coordinator is gone.

    Attributes:
        room: what running jobs take.
    """

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        swarm: SwarmView,
        meter: Meter,
        *,
        price: int,
        successors: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._successors = successors
        self._identity = identity
        self._overlay = overlay
        self._swarm = swarm
        self._meter = meter
        self._price = price
        self.room = Room(swarm.workers)
        self._disputes = Disputes(identity.peer_id)
        self._relief = Relief(swarm.worker, swarm.usual, self.room.jobs)
        self._admission = Admission(self._find_room, self._refusal, self.room.free)
        self._running: dict[bytes, RunningJob] = {}  # by their tickets' ids
        overlay.handle(PACK_PROTOCOL, self._handle_pack)

    async def _handle_pack(self, stream: OverlayStream) -> None:
        """Serve a /azu/pack/1 stream: tokens of any of the jobs whose last stage the sender is."""
        channel = Channel(stream, PACK, max_body=0)
        while (received := await channel.receive()) is not None:
            message, _ = received
            if not isinstance(message, Nexts):
                raise ProtocolError(f"{type(message).__name__} for a coordinator", code="unexpected_message")
            for job_id, epoch, index, token in message.jobs:
                if (job := self._running.get(job_id)) is not None:  # else it was under way as the job ended
                    job.take(stream.peer_id, epoch, index, token)

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncIterator[RunningJob]:
        """Run a job; see `coordinator.generation.GenerationService.generate`."""
        deadline = trio.current_time() + _WAIT_S
        tries = _TRIES
        for number in count(request.first_chain):
            async with self._started(request, number, deadline) as job:
                # Before its first token nobody has seen anything of a job, and another chain can run it as well; or,
                # where the coordinator stops now, its next life.
                job.is_abandoned = True
                begun = await job.begins()
                tries -= not job.is_turned_away
                if begun or not tries:
                    job.is_abandoned = False
                    if begun:
                        await job.note_tickets()
                    yield job
                    return

    @asynccontextmanager
    async def take_up(
        self, request: GenerationRequest, ticket: JobTicket, handovers: Sequence[Handover]
    ) -> AsyncIterator[RunningJob]:
        """Go on with a job; see `coordinator.generation.GenerationService.take_up`."""
        await self._until_known(frozenset(stage.peer_id for stage in ticket.stages))
        chain = tuple(Placement(stage.peer_id, stage.start, stage.end) for stage in ticket.stages)
        grant = Grant(chain, ticket.dtype, first_positions(ticket.prompt_tokens), ticket.manifest)
        ticket = ticket.model_copy(update=self._leaders())
        self.room.take(grant)
        try:
            async with self._run(request, ticket, grant, is_back=True, handovers=handovers) as job:
                job.is_abandoned = not await job.begins()
                yield job
        finally:
            self._admission.release(grant)

    async def _until_known(self, peer_ids: frozenset[str]) -> None:
        """Wait for workers' records, for as long as those that live may take to be found."""
        with trio.move_on_after(_FIND_S):
            while not peer_ids <= {worker.peer_id for worker in self._swarm.workers()}:  # noqa: ASYNC110
                await trio.sleep(_LOOK_S)

    @asynccontextmanager
    async def _started(self, request: GenerationRequest, number: int, deadline: float) -> AsyncIterator[RunningJob]:
        """The job in a chain of workers that has room for it; the `number`-th that is tried, from 0."""
        grant = await self._admission.admit(request, deadline)
        try:
            async with self._run(request, self._ticket(request, number, grant), grant) as job:
                yield job
        finally:
            self._admission.release(grant)

    @asynccontextmanager
    async def _run(
        self,
        request: GenerationRequest,
        ticket: JobTicket,
        grant: Grant,
        *,
        is_back: bool = False,
        handovers: Sequence[Handover] = (),
    ) -> AsyncIterator[RunningJob]:
        manifest = request.model.manifest
        job = RunningJob(
            self._identity,
            self._overlay,
            ticket,
            request.prompt,
            self._meter.asked_by(request.wallet, request.key_id),
            vocab_size=manifest.vocab_size,
            pace=self._pace(grant.chain),
            on_lost=self._swarm.blame,
            on_leaving=self._swarm.note_leaving,
            reserves=Reserves(
                others=partial(self._others, manifest, grant),
                relief=partial(self._relieve, manifest, grant),
                parts=self._relief.parts,
                cache_s=partial(cache_seconds, manifest, self._swarm.record),
            ),
            note=request.note,
            leads=request.leads,
            is_back=is_back,
            handovers=handovers,
        )
        self._running[ticket.job_id] = job
        try:
            async with job.running():
                yield job
        finally:
            del self._running[ticket.job_id]
            self._judge(job.report)

    def _judge(self, report: JobReport | None) -> None:
        """Count disagreements of an ended job against its workers."""
        if report is None:
            return
        for peer_id, weight, error in self._disputes.judge(report, trio.current_time()):
            log(logger, logging.WARNING, "earnings held", job=report.job_id, peer=peer_id, reason=error.message)
            self._swarm.blame(peer_id, weight, error)

    def _find_room(self, request: GenerationRequest) -> Grant | None:
        """Room for the job in a chain of workers, taken for it."""
        found = self._route(request)
        if found is None:
            return None
        route, dtype = found
        grant = Grant(route.stages, dtype, first_positions(len(request.prompt)), request.model.manifest.digest)
        self.room.take(grant)
        self.room.note({stage.peer_id for stage in grant.chain}, grant.tokens)
        return grant

    def _refusal(self, request: GenerationRequest) -> CapacityError | None:
        """Why the job would wait in vain, if it would."""
        manifest = request.model.manifest
        if missing := missing_layers(manifest, self._swarm.workers()):
            return not_covered(manifest.model_id, missing)
        if self._route(request, when_empty=True) is None:
            return too_large(len(request.prompt) + request.max_tokens)
        return None

    def _route(self, request: GenerationRequest, *, when_empty: bool = False) -> tuple[Route, WeightFormat] | None:
        """The fastest chain for the job and its dtype, or None; of the chains that have room, with the fewest faults.

        Args:
            when_empty: as if no job were running.
        """
        first = first_positions(len(request.prompt))
        demand = Demand(len(request.prompt), min(request.max_tokens, _EXPECTED_TOKENS))
        manifest = request.model.manifest
        workers = self.room.able(len(request.prompt) + request.max_tokens, when_empty=when_empty)
        faults = {worker.peer_id: self._swarm.faults(worker.peer_id) for worker in workers}
        for most in sorted(set(faults.values())):
            routes: list[tuple[float, WeightFormat, Route]] = []
            # Activations travel in the stages' own dtype, so a chain is of one dtype throughout.
            for dtype in sorted({worker.dtype for worker in workers}):
                alike = [worker for worker in workers if worker.dtype == dtype and faults[worker.peer_id] <= most]
                views = views_for(manifest, alike, self._swarm.faults)
                links = links_of(manifest, dtype, alike)
                route = find_route(manifest.n_layers, views, first, demand=demand, links=links, parts=True)
                if route is not None:
                    routes.append((route.seconds, dtype, route))
            if routes:
                _, best, route = min(routes, key=lambda each: each[:2])
                return route, best
        return None

    def _pace(self, chain: tuple[Placement, ...]) -> float:
        """Seconds that a position takes through the chain, as its workers measured."""
        layer_us = {worker.peer_id: worker.layer_us for worker in self._swarm.workers()}
        return sum((p.end - p.start) * layer_us.get(p.peer_id, 0) for p in chain) / 1e6

    def _relieve(
        self, manifest: Manifest, grant: Grant, ticket: JobTicket, slow: Slow, done: int, unwanted: Collection[str]
    ) -> Change | None:
        """Who takes over a slow stage of a job after so many tokens; None where all stay."""
        index = ticket.stage_of(slow.peer_id)
        if index is None:
            return None
        accepts = partial(self._relief.accepts, manifest, ticket, slow, done)
        away_s = self._relief.away_s(manifest, ticket, index)
        change = self._others(manifest, grant, ticket, [index], {*unwanted, slow.peer_id}, accepts, away_s)
        if change is None:
            return None
        self._relief.moved(slow.peer_id, *change.peers.values())
        return change._replace(left=(index,))

    def _others(
        self,
        manifest: Manifest,
        grant: Grant,
        ticket: JobTicket,
        lost: Collection[int],
        unwanted: Collection[str],
        accepts: Accepts = lambda _: True,
        away_s: Callable[[WorkerView], float] = lambda _: 0.0,
    ) -> Change | None:
        """Who takes the lost stages over, and counts as running the job from then on; or None. See `find_others`."""
        alike = [worker for worker in self.room.able(ticket.total_tokens) if worker.dtype == ticket.dtype]
        views = views_for(manifest, alike, self._swarm.faults)
        links = links_of(manifest, ticket.dtype, alike)
        change = find_others(ticket, lost, unwanted, views, links, grant.tokens, accepts, away_s)
        if change is None:
            return None
        stages = (change.cut or ticket).amended(change.peers, ticket.issued_at).stages
        self.room.change(grant, (Placement(each.peer_id, each.start, each.end) for each in stages))
        self.room.note(change.peers.values(), grant.tokens)
        return change

    def _ticket(self, request: GenerationRequest, number: int, grant: Grant) -> JobTicket:
        now = int(time.time())
        tokens = len(request.prompt) + request.max_tokens
        life = min(_TICKET_LIFE_S + _TICKET_LIFE_PER_TOKEN_S * tokens, _TICKET_MAX_LIFE_S)
        return JobTicket.model_validate(
            {
                # A worker takes no job's id twice, and it may have a part in the next chain too.
                "job_id": request.job_id[:-1] + bytes([number % 256]),
                "epoch": 0,
                "manifest": request.model.manifest.digest,
                "n_layers": request.model.manifest.n_layers,
                "stages": [{"peer_id": p.peer_id, "start": p.start, "end": p.end} for p in grant.chain],
                "dtype": grant.dtype,
                "prompt_tokens": len(request.prompt),
                "max_tokens": request.max_tokens,
                "stop_tokens": request.stop_tokens,
                "sampling": request.sampling,
                "price": self._price,
                "begun_at": now,
                "issued_at": now,
                "expires_at": now + life,
                **self._leaders(),
            }
        )

    def _leaders(self) -> dict[str, object]:
        """Of a ticket: who leads the job, and who may after that."""
        successors = tuple(self._successors())[:MAX_SUCCESSORS]
        return {"coordinator": self._identity.peer_id, "successors": successors}


def too_large(tokens: int) -> CapacityError:
    """The error for a job that fits no chain of workers, however idle."""
    return CapacityError(
        f"prompt and max_tokens together are {tokens} tokens, more than the workers' KV caches hold",
        remedy="Send a smaller max_tokens or a shorter prompt, or let workers with more memory join",
    )


def not_covered(model_id: str, missing: tuple[tuple[int, int], ...]) -> CapacityError:
    """The error for a model that the swarm does not cover, naming the layers that are missing."""
    return CapacityError(
        f"the swarm does not cover {model_id}: no worker has layers {layers_text(missing)} loaded",
        code="model_not_covered",
        remedy="Wait until workers have loaded them, or let more workers join",
    )
