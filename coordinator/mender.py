"""How a running job gets over the loss of a stage, or leaves one that has become slow; the client sees a pause:

    stage lost ─► another peer found ─► ticket of the next epoch to all ─► all paused ─► told where to go on
                        ▲                                                     │
                        └────────────── another one lost meanwhile ◄──────────┘

A stage whose worker is about to leave is replaced in the same way, but that the job runs on until another peer is
found, and ends there if it is about to end anyway. So is one whose worker has become slow, where that is worth it:
`coordinator/hedging.py`.

`coordinator/mending.py` says where each stage goes on. Before the first token, a job whose stages did not all take it
up is given up: its runner has other chains to try.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.logs import log
from azu.models.memory import MAX_CHUNK_ROWS
from azu.overlay import Overlay
from azu.tickets import JobTicket
from azu.wire.messages import Failed
from coordinator.answer import Answer
from coordinator.attendance import Attendance
from coordinator.crew import Crew
from coordinator.generation import known_as
from coordinator.hedging import Hedging
from coordinator.mending import settle, work_of
from coordinator.reserves import Change, Reserves

__all__ = ["Mender", "OnLeaving", "OnLost"]

logger = logging.getLogger(__name__)

# Told a peer id, the weight of its fault and the error, as soon as a stage is lost.
OnLost = Callable[[str, int, AzuError], None]
# Told a peer id, as soon as that says that it is about to leave.
OnLeaving = Callable[[str], None]

# A job in which no token comes for this long, and so many times what the workers' own measurements promise, is given
# up: its stages may say that they live for as long as they like.
_STALL_S = 60.0
_STALL_SLACK = 10.0
# How much a fault weighs against the peer that seems to be at fault, and against one that may be: its accuser, who may
# lie, and everybody in a job that stalls.
_AT_FAULT, _SUSPECT = 2, 1
# So long after its last token a job waits for workers that can take lost stages over: they may have to load the layers.
_REPLACE_S = 300.0
_LOOK_S = 0.5
# A job that ends within this time is not moved from a worker that leaves.
_ENDS_S = 2.0
# What a KV cache may take beyond what the measurements promise, and so many times that.
_CACHE_S, _CACHE_SLACK = 5.0, 3.0
# So often it is looked whether a stage has become slow.
_GLANCE_S = 1.0
# Stages have this long to pause, beyond what a pass takes.
_PAUSE_S = 30.0
# A peer that was lost is not taken again for this long.
_SHUN_S = 10.0
# After so many amendments without a token between them, a job without any token ends, and another one takes its time.
_QUICK_AMENDMENTS = 8
_AGAIN_S = 2.0


class Mender:
    """Keeps one job going.

    Args:
        pace: seconds that a position takes through all stages, as their workers measured.
        is_back: its stages have kept the job while this coordinator was away, and are being paused.

    Attributes:
        amendments: of the job, in all.
        is_mending: whether its stages are being paused, or wait to be told where to go on.
    """

    def __init__(
        self,
        crew: Crew,
        answer: Answer,
        overlay: Overlay,
        *,
        pace: float,
        on_lost: OnLost,
        on_leaving: OnLeaving,
        reserves: Reserves,
        is_back: bool = False,
    ) -> None:
        self.amendments = 0
        self.is_mending = is_back
        self._is_back = is_back
        self._crew = crew
        self._answer = answer
        self._overlay = overlay
        self._pace = pace
        self._on_lost = on_lost
        self._on_leaving = on_leaving
        self._reserves = reserves
        self._hedging = Hedging()
        self._job = known_as(crew.ticket.job_id)
        self._is_mended = False  # and no token has come since
        self._moved_at = trio.current_time()
        self._due = crew.ticket.prompt_tokens  # positions that the next token takes
        self._in_vain = 0  # amendments since the last token
        self._patience: float | None = None  # until when it is tried to mend what has been broken since then
        self._known = 0  # tokens that had come at the last amendment
        self._work = Counter[str]()  # token-layers that amendments cost, since the last token
        self._lost: dict[int, AzuError] = {}  # stages that have to be replaced
        self._shunned: dict[str, float] = {}  # until when
        self._accusers: Counter[str] = Counter()  # since the last token

    def note_token(self) -> None:
        """The next token has come, and is about to be told to the client."""
        now = trio.current_time()
        if self._is_mended and not self.is_mending:
            self._is_mended = False
            pause_s = round(now - self._answer.told_at, 2)
            log(logger, logging.INFO, "job goes on", job=self._job, pause_s=pause_s, **self._work)
            self._work.clear()
        self._moved_at, self._due = now, 1
        self._in_vain, self._patience = 0, None
        self._accusers.clear()

    def note_leaving(self, stage: Attendance) -> None:
        """A stage's worker is about to leave."""
        log(logger, logging.INFO, "stage is leaving", job=self._job, peer=stage.peer_id)
        self._on_leaving(stage.peer_id)
        self._crew.tell_news()

    def take_failure(self, stage: Attendance, failed: Failed) -> None:
        """A stage says that it cannot go on, and whose fault that seems."""
        error = NetworkError(failed.message, code=failed.code)
        is_of_an_earlier_ring = self.is_mending and stage.held is None
        index = self._crew.ticket.stage_of(failed.peer_id)
        if failed.peer_id == stage.peer_id:
            self.lose(stage, error)
        elif self._answer.is_over or is_of_an_earlier_ring or index in self._lost:
            return
        elif index is None:  # it blames a stranger
            self.lose(stage, error)
        else:
            accused = self._crew.stages[index]
            if not accused.is_leaving:  # else it has waited in vain, and is gone
                self._on_lost(stage.peer_id, _SUSPECT, error)
                self._accusers[stage.peer_id] += 1
            self.lose(accused, error)
            if self._accusers[stage.peer_id] > 1:  # whom it accused first is gone: it seems to be its own fault
                self.lose(stage, error)

    def lose(self, stage: Attendance, error: AzuError) -> None:
        """Note that a stage cannot go on. It is replaced, or else ends the token stream."""
        if isinstance(error, ProtocolError | TrustError):
            self._overlay.count_violation(stage.peer_id)
        if self._answer.is_over or self.is_left(stage):
            log(logger, logging.DEBUG, "stage ended", job=self._job, peer=stage.peer_id, reason=error.message)
            return
        log(logger, logging.WARNING, "stage lost", job=self._job, peer=stage.peer_id, reason=error.message)
        if not stage.is_leaving or isinstance(error, ProtocolError | TrustError):
            self._on_lost(stage.peer_id, _AT_FAULT, error)
        if not self._answer.tokens and not (stage.is_up or self.amendments or self._is_back):
            self._answer.give_up(self._loss_of(stage, error))
            return
        self._lost[stage.index] = error
        self._shunned[stage.peer_id] = trio.current_time() + _SHUN_S
        stage.leave()
        self._crew.tell_news()

    def is_left(self, stage: Attendance) -> bool:
        """Whether the job goes on without it."""
        return stage.index in self._lost or stage not in self._crew.stages

    def _loss_of(self, stage: Attendance, error: AzuError) -> AzuError:
        entry = self._crew.ticket.stages[stage.index]
        lost = NetworkError(
            f"the worker {stage.peer_id} with layers {entry.start}-{entry.end - 1} failed: {error.message}",
            code="stage_lost",
            remedy="Send the request again; another worker takes its place where there is one",
        )
        lost.__cause__ = error
        return lost

    async def watch(self) -> None:
        """Have the job paused and resumed where its tokens stop coming, and give it up where that does not help."""
        was_stirred_at = -1
        while True:
            await trio.sleep(1)
            patience = _STALL_S + _STALL_SLACK * self._pace * self._due
            if self._answer.is_over:
                return
            moved_at = max(self._moved_at, *(stage.waits_until for stage in self._crew.stages))
            if self.is_mending or trio.current_time() <= moved_at + patience:
                continue
            tokens = len(self._answer.tokens)
            if was_stirred_at != tokens and all(stage.is_up for stage in self._crew.stages):
                log(logger, logging.WARNING, "job stalls", job=self._job)
                was_stirred_at = tokens
                self.is_mending = True
                self._crew.tell_news()
                continue
            error = NetworkError(f"no token came for {patience:.0f} s", code="job_stalled", remedy="Send it again")
            for stage in self._crew.ticket.stages:
                self._on_lost(stage.peer_id, _SUSPECT, error)
            self._answer.give_up(error)
            return

    async def mend(self, nursery: trio.Nursery) -> None:
        """Replace what is lost, slow, or leaves until the answer is over."""
        while not self._answer.is_over:
            is_broken = bool(self._lost) or self.is_mending
            heirs = None if is_broken else self._find_heirs()
            if heirs is None and not is_broken:
                with trio.move_on_after(_LOOK_S if self._leaving() else _GLANCE_S):
                    await self._crew.news()
                continue
            if heirs and not heirs.cut and not await self._hand_over_caches(nursery, heirs.peers):
                continue
            self.is_mending = True
            if heirs is None or not await self._change(nursery, heirs):
                await self._amend(nursery)
            self._hedging.pause()
            self.is_mending, self._is_mended = False, True
            self._moved_at = trio.current_time()
            self._due = self._crew.ticket.prompt_tokens + len(self._answer.tokens)

    def _find_relief(self) -> Change | None:
        """Who takes a stage over that has become slow; None where all go on."""
        done, ticket = len(self._answer.tokens), self._crew.ticket
        if not done or self._is_mended:
            return None
        for slow in self._hedging.look(done, self._answer.told_at, self._reserves.parts(ticket)):
            paid_up = self._paid_up([ticket.stage_of(slow.peer_id) or 0])
            change = self._reserves.relief(paid_up, slow, done, {*self._unwanted(), *self._hedging.left})
            if change is not None:
                self._hedging.moved(slow.peer_id)
                times = {"step_s": round(slow.step_s, 3), "usual_s": round(slow.usual_s, 3)}
                log(logger, logging.INFO, "stage is slow", job=self._job, peer=slow.peer_id, part=slow.kind, **times)
                return change
        return None

    async def _amend(self, nursery: trio.Nursery) -> None:
        """Bring the job to a ring that runs; it is over afterwards where there is none to be had."""
        while not self._answer.is_over:
            if self._patience is None:
                self._patience = trio.current_time() + (_REPLACE_S if self._answer.tokens or self._is_back else 0.0)
            is_hard = self._in_vain >= _QUICK_AMENDMENTS
            is_too_late = trio.current_time() >= self._patience
            if is_hard:
                await trio.sleep(_AGAIN_S)
            change = self._find_substitutes()
            if self._lost and is_too_late and (change is None or is_hard):
                index, error = next(iter(self._lost.items()))
                self._answer.give_up(self._loss_of(self._crew.stages[index], error))
            elif change is None:
                with trio.move_on_after(_LOOK_S):
                    await self._crew.news()
            elif await self._change(nursery, change):
                return

    async def _change(self, nursery: trio.Nursery, change: Change) -> bool:
        """Have peers take stages over; whether the ring runs then, or nobody needs it any more."""
        if not await self._begin_epoch(nursery, change):
            return True
        await self._until_paused()
        if not self._lost:
            await self._resume()
        return not self._lost

    def _leaving(self) -> list[int]:
        """The stages whose workers are about to leave, but for those that are lost already."""
        return [stage.index for stage in self._crew.stages if stage.is_leaving and stage.index not in self._lost]

    def _find_heirs(self) -> Change | None:
        """Peers for the stages that are left; None where none are, or there are none, or it is not worth it."""
        leaving = self._leaving()
        if not leaving:
            return self._find_relief()
        return None if self._answer.ends_within <= _ENDS_S else self._find_others((), leaving)

    def _paid_up(self, stages: Iterable[int]) -> JobTicket:
        """The ticket in force, in which whoever takes these stages over is paid from now on."""
        ticket = self._crew.ticket
        paid_from = dict.fromkeys(stages, ticket.positions(len(self._answer.tokens)))
        return ticket.amended({}, ticket.issued_at, paid_from, epoch=ticket.epoch)

    async def _hand_over_caches(self, nursery: trio.Nursery, heirs: Mapping[int, str]) -> bool:
        """Have heirs get the KV caches for which that is faster, while the job runs on; False where one of them, or
        another stage, is lost meanwhile, or the job ends.
        """
        ticket = self._crew.ticket
        positions = ticket.positions(len(self._answer.tokens))
        found = {index: self._reserves.cache_s(ticket, index, peer_id, positions) for index, peer_id in heirs.items()}
        seconds = {index: each for index, each in found.items() if each is not None}
        if not seconds:
            return True
        stages = self._crew.bequeath(nursery, {index: heirs[index] for index in seconds}, positions)
        with trio.move_on_after(_CACHE_S + _CACHE_SLACK * max(seconds.values())):
            while not (
                self._answer.is_over
                or self._lost
                or any(stage.is_gone for stage in stages.values())
                or all(stage.inherited is not None for stage in stages.values())
            ):
                await self._crew.news()
        got = {stage.peer_id: stage.inherited for stage in stages.values()}
        log(logger, logging.INFO, "KV caches handed over", job=self._job, positions=got)
        if self._answer.is_over:
            return False
        if not (self._lost or any(stage.is_gone for stage in stages.values())):
            return True
        until = trio.current_time() + _SHUN_S
        self._shunned |= {stage.peer_id: until for stage in stages.values()}
        self._crew.disinherit()
        return False

    def _find_substitutes(self) -> Change | None:
        """Peers for the stages that are lost, and for those that are left too, if there are any."""
        leaving = self._leaving()
        both = self._find_others(self._lost, leaving) if leaving else None
        return both or self._find_others(self._lost, ())

    def _find_others(self, lost: Iterable[int], leaving: Sequence[int]) -> Change | None:
        """Peers for stages that are lost and stages that are left, or None."""
        found = self._reserves.others(self._paid_up(leaving), [*lost, *leaving], self._unwanted())
        return None if found is None else found._replace(left=tuple(leaving))

    def _unwanted(self) -> set[str]:
        now = trio.current_time()
        shunned = {peer_id for peer_id, until in self._shunned.items() if until > now}
        return shunned | {stage.peer_id for stage in self._crew.stages if stage.is_leaving}

    async def _begin_epoch(self, nursery: trio.Nursery, change: Change) -> bool:
        self.amendments += 1
        self._in_vain += 1
        self._known = len(self._answer.tokens)
        before, replaced = self._crew.ticket, set(self._lost if change.cut else change.peers)
        if not await self._crew.amend(nursery, change.peers, self._known, change.left, change.cut):
            if not self._answer.is_over:
                self._answer.give_up(NetworkError("another coordinator leads this job now", code="led_elsewhere"))
            return False
        # What was lost meanwhile may have another index now.
        now = {stage.peer_id: index for index, stage in enumerate(self._crew.ticket.stages)}
        lost = {before.stages[index].peer_id: error for index, error in self._lost.items() if index not in replaced}
        self._lost = {now[peer_id]: error for peer_id, error in lost.items() if peer_id in now}
        epoch = self._crew.ticket.epoch
        log(logger, logging.INFO, "job amended", job=self._job, epoch=epoch, peers=list(change.peers.values()))
        return True

    async def _until_paused(self) -> None:
        """Wait until all stages are paused, or one is lost; those that take too long are."""
        stages = self._crew.stages
        with trio.move_on_after(_PAUSE_S + _STALL_SLACK * self._pace * MAX_CHUNK_ROWS) as patience:
            while not self._lost and not self._answer.is_over and any(stage.held is None for stage in stages):
                await self._crew.news()
        if patience.cancelled_caught:
            for stage in stages:
                if stage.held is None:
                    self.lose(stage, NetworkError("it did not pause in time", code="stage_stalled"))

    async def _resume(self) -> None:
        """Tell all stages where to go on, now that they are paused."""
        if self._answer.is_over:
            return
        held = [stage.held for stage in self._crew.stages if stage.held is not None]
        came = self._answer.tokens[self._known :]
        tokens, starts = settle(self._crew.ticket.prompt_tokens, self._known, came, held)
        if self._is_back and not (tokens or self._answer.tokens):
            self._answer.give_up(
                NetworkError(
                    "the workers that knew its tokens are lost", code="tokens_lost", remedy="Send the request again"
                )
            )
            return
        for token in tokens[len(came) :]:
            self.note_token()
            self._answer.add(token)
            if self._answer.is_complete:
                return
        ticket = self._crew.ticket
        layers = [stage.end - stage.start for stage in ticket.stages]
        anew, again = work_of(layers, ticket.prompt_tokens + len(self._answer.tokens), held, starts)
        self._work.update(anew=anew, again=again)
        await self._crew.resume(starts, self._answer.tokens)
