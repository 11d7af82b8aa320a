"""What a worker's time goes into, counted always: sums that only grow, and the longest of what should be short.

Where a running job's time in a stage goes, as sums over all jobs:

    wait        for the device thread, which computes other jobs' steps     `node.engine.instruments`
    compute     in passes of the device thread                              `node.engine.instruments`
    serialise   into a frame for the next stage
    credit      until the next stage has room in its window
    wire        until the operating system has taken the frame: Noise, Yamux, and a line or a peer that is too slow
    elsewhere   until the next step comes in: the rest of the ring, and the way there and back

What these leave of it is the event loop's. A line's own delay is part of `elsewhere`: no clock is shared with a peer.
Counting takes no lock on the event loop, and nothing grows. Every 5 s the sums are noted, so that there are figures of
the last minute too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import trio

from node.engine.instruments import Passes
from node.links import Links

__all__ = ["Instruments", "LoopWatch", "RingMeter", "Spell", "Sums"]

_SLOT_S = 5.0
_SLOTS = 13  # a minute ago is between the first and the second of them


@dataclass(slots=True)
class RingMeter:
    """Sums since the start over the streams of all jobs, in seconds and bytes of hidden states. Used on the event loop
    only. messages: sent; inputs: steps taken in; links: how far the peers are.
    """

    messages: int = 0
    sent_bytes: int = 0
    serialise_s: float = 0.0
    credit_s: float = 0.0
    wire_s: float = 0.0
    inputs: int = 0
    received_bytes: int = 0
    elsewhere_s: float = 0.0
    links: Links = field(default_factory=Links)

    def note_sent(self, size: int, serialise_s: float, wire_s: float) -> None:
        """Count a message with a body of `size` bytes."""
        self.messages += 1
        self.sent_bytes += size
        self.serialise_s += serialise_s
        self.wire_s += wire_s

    def note_input(self, size: int, waited_s: float) -> None:
        """Count a step's input, and how long its job had nothing to do here before it."""
        self.inputs += 1
        self.received_bytes += size
        self.elsewhere_s += waited_s


class LoopWatch(trio.abc.Instrument):
    """How long the event loop is away from its peers: from when it should wake up until it looks for input again.

    It is called twice for each turn of the loop and not for each step of a task, of which a turn has several: what
    keeps input waiting is the whole turn. That costs 1.2 us a turn (a step of a task takes 2 to 3), and nothing while
    the loop sleeps. A task that sleeps 50 ms and notes how late it is would cost an idle worker more (0.2 to 0.8% of a
    core), and see nothing that is shorter. A turn begins when the first timer is due, or when input ends the wait
    before that. So time that the loop waits for a core or for the interpreter's lock counts too, but for that between
    input's coming and its being noticed, which nobody in the process can know.
    """

    def __init__(self) -> None:
        self._due = self._woke = time.perf_counter()
        self.busy_s = 0.0  # in turns, since the start
        self.longest_s = 0.0  # turn, since the start
        self.recent_s = 0.0  # the longest since `take_longest`

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the running loop until the context is left."""
        self._due = self._woke = time.perf_counter()
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        """A turn ends."""
        now = time.perf_counter()
        self.busy_s += now - self._woke
        stall = now - self._due
        if stall > self.recent_s:
            self.recent_s = stall
            self.longest_s = max(self.longest_s, stall)
        self._due = now + timeout

    def after_io_wait(self, timeout: float) -> None:
        """A turn begins."""
        self._woke = now = time.perf_counter()
        self._due = min(self._due, now)

    def take_longest(self) -> float:
        """The longest turn since this was last called, in seconds."""
        longest, self.recent_s = self.recent_s, 0.0
        return longest


@dataclass(frozen=True, slots=True)
class Sums:
    """What was counted up to one moment, or between two; seconds, bytes and counts. at: by a steady clock, so that a
    difference's is its length.
    """

    at: float
    passes: int
    steps: int
    rows: int
    token_layers: int
    compute_s: float
    waited_s: float
    messages: int
    sent_bytes: int
    serialise_s: float
    credit_s: float
    wire_s: float
    inputs: int
    received_bytes: int
    elsewhere_s: float
    loop_busy_s: float

    def __sub__(self, earlier: Sums) -> Sums:
        return Sums(*(getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)))


@dataclass(frozen=True, slots=True)
class Spell:
    """What happened in some time. longest_pass_s, longest_stall_s: of the device thread and of the event loop."""

    sums: Sums
    longest_pass_s: float
    longest_stall_s: float


class Instruments:
    """Those of one worker. `run()` keeps the last minute; the rest counts without it."""

    def __init__(self, passes: Passes) -> None:
        self.ring = RingMeter()
        self.loop = LoopWatch()
        self.passes = passes
        self._start = self.sums()
        self._slots: deque[Spell] = deque(maxlen=_SLOTS)  # sums: up to the slot's end

    async def run(self) -> None:
        """Watch the loop and keep the last minute until cancelled."""
        with self.loop.watching():
            while True:
                await trio.sleep(_SLOT_S)
                self.turn()

    def turn(self) -> None:
        """Begin another slot of the last minute."""
        self._slots.append(Spell(self.sums(), self.passes.take_longest(), self.loop.take_longest()))

    def sums(self) -> Sums:
        """All that was counted since the start."""
        passes, ring = self.passes.statistics(), self.ring
        return Sums(
            at=time.perf_counter(),
            passes=passes.passes,
            steps=passes.steps,
            rows=passes.rows,
            token_layers=passes.token_layers,
            compute_s=passes.compute_s,
            waited_s=passes.waited_s,
            messages=ring.messages,
            sent_bytes=ring.sent_bytes,
            serialise_s=ring.serialise_s,
            credit_s=ring.credit_s,
            wire_s=ring.wire_s,
            inputs=ring.inputs,
            received_bytes=ring.received_bytes,
            elsewhere_s=ring.elsewhere_s,
            loop_busy_s=self.loop.busy_s,
        )

    def since_start(self) -> Spell:
        """Everything."""
        return Spell(self.sums() - self._start, self.passes.statistics().longest_s, self.loop.longest_s)

    @property
    def waiting(self) -> float:
        """Steps that wait for their pass, as a mean of the last minute (Little's law)."""
        sums = self.last_minute().sums
        return max(0.0, sums.waited_s) / max(sums.at, 1e-3)

    def last_minute(self) -> Spell:
        """The last 60 to 65 s, or everything where that is less."""
        start, slots = self._start, list(self._slots)
        if len(slots) == _SLOTS:
            start, slots = slots[0].sums, slots[1:]
        return Spell(
            self.sums() - start,
            max(self.passes.recent_s, *(slot.longest_pass_s for slot in slots), 0.0),
            max(self.loop.recent_s, *(slot.longest_stall_s for slot in slots), 0.0),
        )
