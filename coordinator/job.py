"""One running job as the coordinator sees it: a stream to each stage, token ids coming back, receipts at the end.

A stage that is lost is replaced, and the client sees a pause:

    stage lost ─► another peer found ─► ticket of the next epoch to all ─► all paused ─► told where to go on
                        ▲                                                     │
                        └────────────── another one lost meanwhile ◄──────────┘

`coordinator/mending.py` says where each stage goes on. Before the first token, a job whose stages did not all take it
up is left to `JobRunner`, which has other chains to try.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import trio

from azu.channel import RefusedError
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.identity import Identity
from azu.logs import log
from azu.models.memory import MAX_CHUNK_ROWS
from azu.overlay import Overlay
from azu.tickets import JobTicket, sign_ticket
from azu.wire.messages import Failed, Message, Paused, Ping, Ready, Token, Waiting
from coordinator.attendance import Attendance
from coordinator.generation import JobReport, SampledToken, known_as
from coordinator.mending import settle
from coordinator.meter import Meter, read_job

__all__ = ["RunningJob", "Substitutes"]

logger = logging.getLogger(__name__)

# Peers for the stages of these indices, for which those given last are not wanted; None while there are none.
Substitutes = Callable[[JobTicket, Collection[int], Collection[str]], Mapping[int, str] | None]

# Stages have this long to answer the end of a job with their receipt.
_RECEIPT_S = 5.0
# A job in which no token comes for this long, and so many times what the workers' own measurements promise, is given
# up: its stages may say that they live for as long as they like.
_STALL_S = 60.0
_STALL_SLACK = 10.0
# How much a fault weighs against the peer that seems to be at fault, and against one that may be: its accuser, who may
# lie, and everybody in a job that stalls.
_AT_FAULT, _SUSPECT = 2, 1
# So long a job waits for a worker that can take a lost stage over: it may have to load the layers first.
_REPLACE_S = 300.0
_LOOK_S = 0.5
# Stages have this long to pause, beyond what a pass takes.
_PAUSE_S = 30.0
# A peer that was lost is not taken again for this long.
_SHUN_S = 10.0
# Amendments without a token between them.
_MAX_AMENDMENTS = 8


class RunningJob:
    """A job in flight; implements `coordinator.generation.Generation`.

    Args:
        vocab_size: token ids are below this.
        pace: seconds that a position takes through all stages, as their workers measured.
        on_lost: told a peer id, the weight of its fault and the error, as soon as a stage is lost.
        substitutes: asked for peers that take stages over; it may count on their being used.
    """

    def __init__(
        self,
        identity: Identity,
        overlay: Overlay,
        ticket: JobTicket,
        prompt: tuple[int, ...],
        meter: Meter,
        *,
        vocab_size: int,
        pace: float,
        on_lost: Callable[[str, int, AzuError], None],
        substitutes: Substitutes,
    ) -> None:
        self.ticket = ticket
        self._identity = identity
        self._overlay = overlay
        self._prompt = prompt
        self._meter = meter
        self._vocab_size = vocab_size
        self._pace = pace
        self._on_lost = on_lost
        self._substitutes = substitutes
        self._stages: list[Attendance] = []
        self._attending = 0
        self._is_ended = False
        self.is_abandoned = False  # before its first token, to another chain, which settles it
        self._tokens: list[int] = []
        self._is_complete = False
        self._begun = trio.Event()
        self._moved_at = trio.current_time()
        self._due = ticket.prompt_tokens  # positions that the next token takes
        self.amendments = 0  # in all
        self._in_vain = 0  # of them since the last token
        self._known = 0  # tokens that had come at the last amendment
        self._lost: dict[int, AzuError] = {}  # stages that have to be replaced
        self._shunned: dict[str, float] = {}  # until when
        self._accusers: Counter[str] = Counter()  # since the last token
        self._is_mending = False
        self._is_mended = False  # and no token has come since
        self._told_at = trio.current_time()  # when the client got its last token
        self._stirred = trio.Event()  # set when what the mender waits for may have come, and then replaced
        self.loss: AzuError | None = None
        self.report: JobReport | None = None  # once it has ended
        # Bounded by the ticket: at most max_tokens tokens and one error are ever put in.
        self._events_in, self._events = trio.open_memory_channel[SampledToken | AzuError](ticket.max_tokens + 1)

    @property
    def job_id(self) -> str:
        """How the client and the ledger know it."""
        return known_as(self.ticket.job_id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have the job run in all stages for as long as the context lasts."""
        async with trio.open_nursery() as nursery:
            envelope = sign_ticket(self._identity, self.ticket)
            self._stages = [self._attend(nursery, index, envelope) for index in range(len(self.ticket.stages))]
            nursery.start_soon(self._watch)
            nursery.start_soon(self._mend, nursery)
            try:
                yield
            finally:
                try:
                    with trio.CancelScope(shield=True):
                        await self.finish()
                finally:
                    nursery.cancel_scope.cancel()
                    for stage in self._stages:
                        stage.leave()

    async def begins(self) -> bool:
        """Wait for the first token; False where a stage is lost before it comes, see `loss`."""
        await self._begun.wait()
        return bool(self._tokens)

    async def tokens(self) -> AsyncIterator[SampledToken]:
        """Token ids as they are sampled; see `Generation.tokens`."""
        async for event in self._events:
            if isinstance(event, AzuError):
                raise event
            yield event
            if event.finish:
                return

    async def finish(self) -> JobReport:
        """End the job in every stage, collect the receipts, and write down who did what. May be called again."""
        if self.report is None:
            tokens = tuple(self._tokens)
            self._is_ended = True
            self._stir()
            for stage in self._stages:
                stage.end(len(tokens))
            with trio.move_on_after(_RECEIPT_S):
                while self._attending:
                    await self._stirred.wait()
            receipts = {stage.index: stage.receipt for stage in self._stages if stage.receipt is not None}
            read = (self.ticket, self._prompt, tokens, receipts)
            self.report = read_job(*read) if self.is_abandoned else await self._meter.settle(*read)
        return self.report

    @property
    def is_turned_away(self) -> bool:
        """Whether a stage had no room for the job after all."""
        cause = self.loss and self.loss.__cause__
        return isinstance(cause, RefusedError) and cause.code == "no_capacity"

    @property
    def _is_over(self) -> bool:
        """Whether nothing that goes wrong from now on matters to the client."""
        return self._is_ended or self._is_complete or self.loss is not None

    # --- the stages

    def _attend(self, nursery: trio.Nursery, index: int, envelope: bytes) -> Attendance:
        is_penalised_last = index == len(self.ticket.stages) - 1 and self.ticket.sampling.repetition_penalty != 1.0
        prompt = self._prompt if index == 0 or is_penalised_last else None
        stage = Attendance(self._overlay, self.ticket, index, envelope, prompt)
        self._attending += 1
        nursery.start_soon(self._attended, stage)
        return stage

    async def _attended(self, stage: Attendance) -> None:
        try:
            await stage.run(self)
        finally:
            self._attending -= 1
            self._stir()

    def hear(self, stage: Attendance, message: Message) -> None:
        """Take a stage's message; see `Audience`."""
        if self._is_left(stage):
            return
        if isinstance(message, Token):
            self._take_token(stage, message)
        elif isinstance(message, Failed):
            self._take_failure(stage, message)
        elif isinstance(message, Paused):
            if stage.held is not None and max(stage.held.tokens, default=0) >= self._vocab_size:
                raise ProtocolError("it knows a token outside the vocabulary", code="bad_token")
            self._stir()
        elif not isinstance(message, Ready | Ping | Waiting):
            raise ProtocolError(f"it sent {type(message).__name__}", code="unexpected_message")

    def _take_token(self, stage: Attendance, token: Token) -> None:
        if self._is_ended or self.loss is not None:
            return
        finish = self._finish(token.token)
        is_last = stage.index == len(self.ticket.stages) - 1
        is_next = (token.index, token.finish) == (len(self._tokens), finish)
        if self._is_complete or not is_last or not is_next or token.token >= self._vocab_size:
            raise ProtocolError("a token came out of turn", code="bad_token")
        self._emit(token.token)

    def _finish(self, token: int) -> Literal["", "stop", "length"]:
        """What ends with the next token, if this is it."""
        if token in self.ticket.stop_tokens:
            return "stop"
        return "length" if len(self._tokens) + 1 == self.ticket.max_tokens else ""

    def _emit(self, token: int) -> None:
        sampled = SampledToken(token, self._finish(token))
        self._tokens.append(token)
        self._is_complete = bool(sampled.finish)
        if self._is_mended and not self._is_mending:
            self._is_mended = False
            pause_s = round(trio.current_time() - self._told_at, 2)
            log(logger, logging.INFO, "job goes on", job=self.job_id, pause_s=pause_s)
        self._told_at = trio.current_time()
        self._moved_at, self._due = trio.current_time(), 1
        self._in_vain = 0
        self._accusers.clear()
        self._begun.set()
        self._events_in.send_nowait(sampled)

    def _take_failure(self, stage: Attendance, failed: Failed) -> None:
        error = NetworkError(failed.message, code=failed.code)
        is_of_an_earlier_ring = self._is_mending and stage.held is None
        index = self.ticket.stage_of(failed.peer_id)
        if failed.peer_id == stage.peer_id:
            self.lose(stage, error)
        elif self._is_over or is_of_an_earlier_ring or index in self._lost:
            return
        elif index is None:  # it blames a stranger
            self.lose(stage, error)
        else:
            self._on_lost(stage.peer_id, _SUSPECT, error)
            self._accusers[stage.peer_id] += 1
            self.lose(self._stages[index], error)
            if self._accusers[stage.peer_id] > 1:  # whom it accused first is gone: it seems to be its own fault
                self.lose(stage, error)

    def lose(self, stage: Attendance, error: AzuError) -> None:
        """Note that a stage cannot go on. It is replaced, or else ends the token stream."""
        if isinstance(error, ProtocolError | TrustError):
            self._overlay.count_violation(stage.peer_id)
        if self._is_over or self._is_left(stage):
            log(logger, logging.DEBUG, "stage ended", job=self.job_id, peer=stage.peer_id, reason=error.message)
            return
        log(logger, logging.WARNING, "stage lost", job=self.job_id, peer=stage.peer_id, reason=error.message)
        self._on_lost(stage.peer_id, _AT_FAULT, error)
        if not self._tokens and not (stage.is_up or self.amendments):
            self._give_up(self._loss_of(stage, error))
            return
        self._lost[stage.index] = error
        self._shunned[stage.peer_id] = trio.current_time() + _SHUN_S
        stage.leave()
        self._stir()

    def _is_left(self, stage: Attendance) -> bool:
        """Whether the job goes on without it."""
        return stage.index in self._lost or self._stages[stage.index] is not stage

    def _loss_of(self, stage: Attendance, error: AzuError) -> AzuError:
        entry = self.ticket.stages[stage.index]
        lost = NetworkError(
            f"the worker {stage.peer_id} with layers {entry.start}-{entry.end - 1} failed: {error.message}",
            code="stage_lost",
            remedy="Send the request again; another worker takes its place where there is one",
        )
        lost.__cause__ = error
        return lost

    def _give_up(self, error: AzuError) -> None:
        self.loss = error
        self._begun.set()
        self._events_in.send_nowait(error)

    # --- mending

    async def _watch(self) -> None:
        """Pause and resume the job where its tokens stop coming, and give it up where that does not help."""
        was_stirred_at = -1
        while True:
            await trio.sleep(1)
            patience = _STALL_S + _STALL_SLACK * self._pace * self._due
            if self._is_over:
                return
            moved_at = max(self._moved_at, *(stage.waits_until for stage in self._stages))
            if self._is_mending or trio.current_time() <= moved_at + patience:
                continue
            if was_stirred_at != len(self._tokens) and all(stage.is_up for stage in self._stages):
                log(logger, logging.WARNING, "job stalls", job=self.job_id)
                was_stirred_at = len(self._tokens)
                self._is_mending = True
                self._stir()
                continue
            error = NetworkError(f"no token came for {patience:.0f} s", code="job_stalled", remedy="Send it again")
            for stage in self.ticket.stages:
                self._on_lost(stage.peer_id, _SUSPECT, error)
            self._give_up(error)
            return

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    async def _mend(self, nursery: trio.Nursery) -> None:
        while not self._is_over:
            if not self._lost and not self._is_mending:
                await self._stirred.wait()
                continue
            self._is_mending = True
            await self._amend(nursery)
            self._is_mending, self._is_mended = False, True
            self._moved_at, self._due = trio.current_time(), self.ticket.prompt_tokens + len(self._tokens)

    async def _amend(self, nursery: trio.Nursery) -> None:
        """Bring the job to a ring that runs; it is over afterwards where there is none to be had."""
        deadline = trio.current_time() + (_REPLACE_S if self._tokens else 0.0)
        while not self._is_over:
            peers = self._substitutes(self.ticket, self._lost.keys(), self._unwanted())
            is_hopeless = self._in_vain >= _MAX_AMENDMENTS or (peers is None and trio.current_time() >= deadline)
            if self._lost and is_hopeless:
                index, error = next(iter(self._lost.items()))
                self._give_up(self._loss_of(self._stages[index], error))
            elif peers is None:
                with trio.move_on_after(_LOOK_S):
                    await self._stirred.wait()
            else:
                self._lost.clear()
                self._begin_epoch(nursery, peers)
                await self._until_paused()
                if not self._lost:
                    self._resume()
                    return

    def _unwanted(self) -> set[str]:
        now = trio.current_time()
        return {peer_id for peer_id, until in self._shunned.items() if until > now}

    def _begin_epoch(self, nursery: trio.Nursery, peers: Mapping[int, str]) -> None:
        self.amendments += 1
        self._in_vain += 1
        self._known = len(self._tokens)
        self.ticket = self.ticket.amended(peers, int(time.time()))
        log(logger, logging.INFO, "job amended", job=self.job_id, epoch=self.ticket.epoch, peers=list(peers.values()))
        envelope = sign_ticket(self._identity, self.ticket)
        for index, stage in enumerate(self._stages):
            if index in peers:
                self._stages[index] = self._attend(nursery, index, envelope)
            else:
                stage.amend(self.ticket, envelope, len(self._tokens))

    async def _until_paused(self) -> None:
        """Wait until all stages are paused, or one is lost; those that take too long are."""
        with trio.move_on_after(_PAUSE_S + _STALL_SLACK * self._pace * MAX_CHUNK_ROWS) as patience:
            while not self._lost and not self._is_over and any(stage.held is None for stage in self._stages):
                await self._stirred.wait()
        if patience.cancelled_caught:
            for stage in self._stages:
                if stage.held is None:
                    self.lose(stage, NetworkError("it did not pause in time", code="stage_stalled"))

    def _resume(self) -> None:
        """Tell all stages where to go on, now that they are paused."""
        if self._is_over:
            return
        held = [stage.held for stage in self._stages if stage.held is not None]
        came = self._tokens[self._known :]
        tokens, starts = settle(self.ticket.prompt_tokens, self._known, came, held)
        for token in tokens[len(came) :]:
            self._emit(token)
            if self._is_complete:
                return
        for stage, start in zip(self._stages, starts, strict=True):
            stage.resume(start, self._tokens)
