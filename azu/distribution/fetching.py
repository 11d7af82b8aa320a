"""The needing side of /azu/layers/1: files from several holders at once, verified piece by piece as they come.

One task talks to each holder: it asks every few seconds what the holder has by now, and keeps some pieces under way.
What came goes to a few tasks that verify and write it in threads. azu.distribution.schedule decides which piece to ask
of whom; everything here only does as it says. Memory is bounded: a holder has at most DEPTH pieces under way, of which
one is in memory and the rest in its stream's window, and _STORERS + _QUEUED more are being stored.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import trio

from azu.distribution.buffers import Buffers
from azu.distribution.holder import DEPTH, Holder
from azu.distribution.offenders import Offenders
from azu.distribution.patience import Patience
from azu.distribution.progress import FetchProgress
from azu.distribution.schedule import Piece, Schedule
from azu.errors import AzuError, NetworkError, ProtocolError, TrustError
from azu.logs import log, show_status
from azu.models.manifest import Blob
from azu.models.partial import PartialBlob
from azu.models.pieces import piece_count, piece_digests
from azu.models.store import LayerStore
from azu.overlay import Overlay
from azu.sizes import format_size

__all__ = ["Fetch", "fetch_blobs"]

logger = logging.getLogger(__name__)

FindHolders = Callable[[], Awaitable[Sequence[str]]]
Fallback = Callable[[Blob], Awaitable[int]]

_STORERS = 2  # pieces being hashed and written at once
_QUEUED = 2  # pieces that wait for that
_MAX_HOLDERS = 32  # that are kept in touch with
_REPORT_S, _SHOW_S = 5.0, 0.5  # between two lines of the log about how far it is, and two looks of a terminal's line
_REASONS = 8  # the latest ones that an error names: each has a peer's own words
_CHANCE = random.SystemRandom()


async def fetch_blobs(
    overlay: Overlay,
    store: LayerStore,
    blobs: Iterable[Blob],
    *,
    peers: Sequence[str],
    offenders: Offenders,
    find_more: FindHolders | None = None,
    fallback: Fallback | None = None,
    progress: FetchProgress | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
) -> None:
    """Bring files into the store, with their piece lists; those that are there and whole are not asked for.

    Cancel it at any time: what was verified stays, and the next attempt goes on from there.

    Args:
        peers: whom to ask, to begin with.
        offenders: whom not to ask; who sends wrong bytes is added.
        find_more: asked again and again while it lasts for peers that may have joined.
        fallback: brings a file that no peer has into the store, and says how large it is, or raises an AzuError. Asked
            for a piece list, it may bring the file that it belongs to, too.
        progress: kept up to date.

    Raises:
        NetworkError: code "no_provider", where nobody has some file.
        ModelError: the manifest contradicts itself.
        InternalError: the disk is full.
    """
    wanted = {blob.digest: blob for blob in blobs}
    progress = progress or FetchProgress()
    missing = await _missing(store, wanted.values())
    lists = await _missing(store, filter(None, (blob.piece_list for blob in wanted.values())))
    progress.total += _size(wanted.values())
    progress.done += _size(wanted.values()) - _size(missing.values())
    for group, counts in ((lists, False), (missing, True)):
        left = {digest: blob for digest, blob in group.items() if not store.has(digest)}  # lists may bring their files
        if left:
            fetch = Fetch(overlay, store, left, offenders, fallback, progress, patience, counts=counts)
            await fetch.run(peers, find_more)


async def _missing(store: LayerStore, blobs: Iterable[Blob]) -> dict[str, Blob]:
    """Those that are not here, or not what they should be."""
    return {blob.digest: blob for blob in blobs if not await trio.to_thread.run_sync(store.check, blob.digest)}


def _size(blobs: Iterable[Blob]) -> int:
    return sum(blob.size for blob in blobs)


class Fetch:
    """One fetch: what all its tasks share."""

    def __init__(
        self,
        overlay: Overlay,
        store: LayerStore,
        blobs: Mapping[str, Blob],
        offenders: Offenders,
        fallback: Fallback | None,
        progress: FetchProgress,
        patience: Patience,
        *,
        counts: bool,
    ) -> None:
        self.overlay = overlay
        self.blobs = blobs
        self.patience = patience
        self.progress = progress
        self.buffers = Buffers()
        self._counts = counts  # whether what peers send is part of the progress
        self.changed = trio.Event()  # set when there may be something new to ask for, and then replaced
        self.sending: set[str] = set()  # peers that pieces are asked of now
        self._store = store
        self._offenders = offenders
        self._fallback = fallback
        self._holders: dict[str, Holder] = {}
        self._left: set[str] = set()  # peers that are not asked again in this fetch
        self.faults: dict[str, str] = {}  # why a peer, or the hub, could not send something: its last reason
        self._suspects: dict[str, set[str]] = {}  # file -> peers whose bytes of it were wrong
        self._over = trio.Event()
        self._failure: AzuError | None = None
        self._last_piece = trio.current_time()
        self._incoming: dict[str, tuple[ExitStack, PartialBlob]] = {}
        self._opening = trio.Lock()
        self._to_store, self._stored = trio.open_memory_channel[tuple[str, Piece, bytearray]](_QUEUED)

    async def run(self, peers: Sequence[str], find_more: FindHolders | None) -> None:
        """Fetch all of it; raises as `fetch_blobs` does."""
        try:
            files = {digest: await self._pieces_to_fetch(blob) for digest, blob in self.blobs.items()}
            self.schedule = Schedule(files, {digest: _CHANCE.random() for digest in files}, depth=DEPTH)
            for digest in [digest for digest, pieces in files.items() if not pieces]:
                await self._commit(digest)
            if self.schedule.missing:
                await self._run_tasks(peers, find_more)
        finally:
            for stack, _ in self._incoming.values():
                stack.close()

    async def _run_tasks(self, peers: Sequence[str], find_more: FindHolders | None) -> None:
        async with trio.open_nursery() as nursery:
            self._start_holders(nursery, peers)
            if find_more is not None:
                nursery.start_soon(self._find_holders, nursery, find_more)
            for _ in range(_STORERS):
                nursery.start_soon(self._store_pieces)
            nursery.start_soon(self._watch)
            nursery.start_soon(self._report)
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    # --- who has it

    def _start_holders(self, nursery: trio.Nursery, peers: Sequence[str]) -> None:
        for peer_id in peers:
            known = peer_id in self._holders or peer_id in self._left or peer_id == self.overlay.peer_id
            if known or len(self._holders) >= _MAX_HOLDERS:
                continue
            if peer_id in self._offenders:
                self.faults[peer_id] = f"it sent wrong bytes less than a day ago ({self._offenders.path})"
                continue
            self._holders[peer_id] = holder = Holder(peer_id, self)
            nursery.start_soon(self._keep, holder)

    async def _keep(self, holder: Holder) -> None:
        try:
            await holder.run()
        finally:
            del self._holders[holder.peer_id]  # a later look-up may find it again

    async def _find_holders(self, nursery: trio.Nursery, find_more: FindHolders) -> None:
        pause = self.patience.refresh
        while True:
            try:
                self._start_holders(nursery, await find_more())
            except NetworkError as error:
                log(logger, logging.DEBUG, "holders cannot be looked up", reason=str(error))
            await trio.sleep(pause)
            pause = min(2 * pause, 10 * self.patience.refresh)

    def leave(self, peer_id: str, error: Exception) -> None:
        """Note a peer's fault; one that broke the protocol or sent wrong bytes is asked nothing any more."""
        if peer_id in self._left:  # more of the same was under way
            return
        text = str(error) or f"nothing came for {self.patience.stall:g} s, or too slowly"
        self.faults[peer_id] = text
        is_violation = isinstance(error, ProtocolError | TrustError)
        level = logging.WARNING if is_violation else logging.INFO
        log(logger, level, "cannot fetch from peer", peer=peer_id, reason=text)
        if is_violation:
            self.overlay.count_violation(peer_id)
            self._left.add(peer_id)
        if peer_id in self._holders and is_violation:
            self._holders[peer_id].scope.cancel()

    # --- what came

    async def to_store(self, peer_id: str, piece: Piece, data: bytearray) -> None:
        """Hand a piece over that came; waits while those before it are being stored."""
        await self._to_store.send((peer_id, piece, data))

    async def _store_pieces(self) -> None:
        async for peer_id, piece, data in self._stored:
            try:
                incoming = await self._open(self.blobs[piece.digest])
                await trio.to_thread.run_sync(incoming.write, piece.index, data)
                self._last_piece = trio.current_time()
                if self._counts and self.schedule.needs(piece):
                    self.progress.add(peer_id, len(data))
                if self.schedule.stored(piece):
                    await self._commit(piece.digest)
                self._news()
            except TrustError as error:
                self.leave(peer_id, error)
                self._suspects.setdefault(piece.digest, set()).add(peer_id)
                self.schedule.failed(peer_id, piece)
                self.wake()
            except AzuError as error:  # ours or the publisher's fault: no other peer could do better
                self._failure = error
                self._over.set()
            self.buffers.give_back(data)

    async def _pieces_to_fetch(self, blob: Blob) -> Sequence[int]:
        if not self._store.has_unfinished(blob.digest):
            return range(piece_count(blob.size))
        incoming = await self._open(blob)
        self.progress.done += blob.size - incoming.missing_bytes if self._counts else 0
        return sorted(incoming.missing)

    async def _open(self, blob: Blob) -> PartialBlob:
        async with self._opening:
            if blob.digest not in self._incoming:
                self._incoming[blob.digest] = await trio.to_thread.run_sync(self._open_file, blob)
            return self._incoming[blob.digest][1]

    def _open_file(self, blob: Blob) -> tuple[ExitStack, PartialBlob]:
        pieces = blob.piece_list
        listed = self._store.read(pieces.digest, 0, pieces.size) if pieces is not None else b""
        with ExitStack() as stack:
            incoming = stack.enter_context(self._store.incoming(blob, piece_digests(blob, listed)))
            return stack.pop_all(), incoming

    async def _commit(self, digest: str) -> None:
        stack, incoming = self._incoming.pop(digest)
        with stack:
            await trio.to_thread.run_sync(incoming.commit)
        self._convict(digest)

    def _convict(self, digest: str) -> None:
        """The file is whole, so its manifest told the truth: who sent other bytes lied, and not the publisher."""
        for peer_id in self._suspects.pop(digest, ()):
            self._offenders.add(peer_id)

    # --- how it goes

    def _news(self) -> None:
        if not self.schedule.missing:
            self._over.set()
        self.wake()

    def wake(self) -> None:
        """Let idle holders look again what there is to ask for."""
        self.changed.set()
        self.changed = trio.Event()

    async def _watch(self) -> None:
        """Fetch what nobody has from where it was published from, and know when to give up."""
        since: dict[str, float] = {}
        while True:
            await trio.sleep(min(0.5, self.patience.fallback, self.patience.give_up / 4))
            now = trio.current_time()
            quiet = now - self._last_piece
            # Who says that it has a file, and then sends nothing of it, must not keep us from the others for ever.
            orphans = self.schedule.orphans if quiet < self.patience.stuck else self.schedule.missing
            since = {digest: since.get(digest, now) for digest in orphans}
            lost = [digest for digest in orphans if now - since[digest] >= self.patience.fallback]
            if self._fallback is not None:
                if lost:
                    await self._fall_back(lost[0], self._fallback)
            elif orphans and quiet >= self.patience.give_up:
                self._failure = _nobody_has(orphans, self.faults)
                self._over.set()

    async def _fall_back(self, digest: str, fallback: Fallback) -> None:
        self.schedule.claim(digest, True)
        try:
            size = await fallback(self.blobs[digest])
        except AzuError as error:
            log(logger, logging.WARNING, "cannot fetch what no peer has", reason=str(error))
            self.faults["the hub"] = str(error)
            self._fallback = None
            self.schedule.claim(digest, False)
        else:
            unfinished = self._incoming.get(digest)
            counted = self.blobs[digest].size - unfinished[1].missing_bytes if unfinished else 0
            self.progress.add("the hub", size - counted)
            self.schedule.completed(digest)
            self._convict(digest)
            self._news()

    async def _report(self) -> None:
        """In a terminal's last line, or else in the log every few seconds."""
        now, logged = trio.current_time(), trio.current_time()
        seen = deque([(now, self.progress.here)], maxlen=round(_REPORT_S / _SHOW_S) + 1)
        try:
            while True:
                await trio.sleep(_SHOW_S)
                now, (then, before) = trio.current_time(), seen[0]
                seen.append((now, self.progress.here))
                rate = int((self.progress.here - before) / (now - then))
                if not show_status(self.progress.text(rate, len(self.sending))) and now >= logged + _REPORT_S:
                    logged = now
                    log(
                        logger, logging.INFO, "fetching", percent=self.progress.percent,
                        done=format_size(self.progress.here), of=format_size(self.progress.total),
                        per_second=format_size(rate), peers=len(self.sending),
                    )  # fmt: skip
        finally:
            show_status("")


def _nobody_has(orphans: Sequence[str], faults: Mapping[str, str]) -> NetworkError:
    what = f"file {orphans[0][:12]}" if len(orphans) == 1 else f"{len(orphans)} files"
    reasons = "; ".join(f"{peer_id}: {text}" for peer_id, text in [*faults.items()][-_REASONS:])
    return NetworkError(
        f"no peer could send {what} ({reasons or 'none has it'})",
        code="no_provider",
        remedy="Check that the coordinator or another worker with these layers is online",
    )
