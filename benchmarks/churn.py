"""A swarm whose workers come and go: are records found, and are dead workers forgotten, in time?

    python -m benchmarks.churn [--nodes 60] [--minutes 5] [--rate 0.2] [--per-process 3] [--freeze]

Real azu-nodes' workers without a model in memory, several to a process, on loopback, with an azu-bootstrap of its own
and a coordinator's view of the swarm. `--rate` of them go each minute and as many come: half leave properly, one after
the other, the other half dies without a word, a whole process at a time: by SIGKILL, or with `--freeze` by SIGSTOP,
after which the kernel still takes connections and nobody ever answers, as with a machine that hangs.

Meanwhile nodes picked by chance look up the records of others picked by chance. A look-up counts if its target has been
in the swarm for SETTLED_S and outlives it, and succeeds if it returns a record that is in force. The exit code is 1
where an aim is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from azu.errors import NetworkError
from azu.identity import Identity
from azu.joining import stay_joined
from azu.overlay import OverlayConfig, open_overlay
from azu.records import VALIDATORS
from benchmarks.nodes import LOOPBACK, NodeProcess, model
from benchmarks.processes import GoneError, Process, open_processes
from coordinator.swarm import SwarmView
from tests.local_swarm import Program

FOUND_AIM = 0.99  # of the look-ups of live records
GONE_AIM_S = 30.0
SETTLED_S = 5.0  # after joining, a worker's record may take this long to arrive
LOOKUPS_PER_S = 4.0
MODELS = 4  # each worker holds a layer of one of them
_GLANCE_S = 0.1  # how often the coordinator's view is looked at
AFTERWARDS_S = 90.0  # how long it is watched after the last death


@dataclass(frozen=True, slots=True)
class Options:
    """See the module. rate: the share of the nodes that goes, and comes, each minute."""

    nodes: int = 60
    minutes: float = 5.0
    rate: float = 0.2
    per_process: int = 3
    freeze: bool = False


@dataclass(eq=False)
class Member:
    """A worker's history. Times are trio's clock's."""

    home: Process
    held: int
    peer_id: str
    join_seconds: float
    joined_at: float
    seen_at: float | None = None  # by the coordinator, first
    last_seen: float = 0.0
    ended_at: float | None = None
    is_killed: bool = False

    @property
    def gone_after(self) -> float:
        """How long after its end the coordinator still saw it."""
        assert self.ended_at is not None
        return max(0.0, self.last_seen - self.ended_at)


@dataclass
class Result:
    """What was measured; times in seconds."""

    members: list[Member] = field(default_factory=list)
    lookups: list[float] = field(default_factory=list)  # the successful ones
    failed: list[str] = field(default_factory=list)
    provided: list[float] = field(default_factory=list)  # the share of a model's live holders that was found
    is_settled: bool = False  # in the end the coordinator saw exactly those that lived

    @property
    def found(self) -> float:
        """The share of the look-ups that succeeded."""
        return len(self.lookups) / max(1, len(self.lookups) + len(self.failed))

    def gone(self, *, killed: bool) -> list[float]:
        """How long the coordinator saw workers that had died, or left."""
        ended = [each for each in self.members if each.ended_at is not None and each.seen_at is not None]
        return sorted(each.gone_after for each in ended if each.is_killed is killed)

    @property
    def holds(self) -> bool:
        """Whether the aims are met."""
        latest = max(self.gone(killed=True), default=0.0)
        return self.found >= FOUND_AIM and latest <= GONE_AIM_S and self.is_settled


class Churn:
    """One run."""

    def __init__(self, start: Callable[[], Process], view: SwarmView) -> None:
        self.result = Result()
        self._start = start
        self._view = view
        self._chance = random.Random(4)

    @property
    def living(self) -> list[Member]:
        return [each for each in self.result.members if each.ended_at is None]

    async def add(self, home: Process) -> None:
        """One more worker in a process."""
        held = self._chance.randrange(MODELS)
        peer_id, seconds = await home.ask("join", held)
        self.result.members.append(Member(home, held, peer_id, seconds, trio.current_time()))

    async def fill(self, count: int) -> None:
        """A new process with so many workers."""
        home = self._start()
        for done in range(count):
            try:
                await self.add(home)
            except GoneError:  # killed in the middle of it
                await self.fill(count - done)
                return

    def kill(self, *, freeze: bool) -> int:
        """Let a process die; how many workers went with it."""
        home = self._chance.choice(self.living).home
        now = trio.current_time()
        home.kill(freeze=freeze)
        victims = [each for each in self.living if each.home is home]
        for each in victims:
            each.ended_at, each.is_killed = now, True
        return len(victims)

    async def replace(self) -> None:
        """One worker leaves, and another joins in the same process."""
        member = self._chance.choice(self.living)
        member.ended_at = trio.current_time()
        try:
            await member.home.ask("leave", member.peer_id)
            await self.add(member.home)
        except GoneError:
            pass  # killed in the middle of it

    async def watch(self) -> None:
        """Note whom the coordinator sees, for ever."""
        while True:
            now, seen = trio.current_time(), self._seen()
            for each in self.result.members:
                if each.peer_id in seen:
                    each.seen_at, each.last_seen = each.seen_at or now, now
            await trio.sleep(_GLANCE_S)

    async def look(self) -> None:
        """Look records up, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                before = trio.current_time() - SETTLED_S
                settled = [each for each in self.living if each.joined_at < before]
                if len(settled) > 1:
                    asker, target = self._chance.sample(settled, 2)
                    nursery.start_soon(self._look_up, asker, target)
                await trio.sleep(1 / LOOKUPS_PER_S)

    async def _look_up(self, asker: Member, target: Member) -> None:
        holders = {
            each.peer_id for each in self.living if each.held == target.held and each.joined_at < target.joined_at
        }
        fault, seconds, named = "", 0.0, ()
        try:
            fault, seconds = await asker.home.ask("record", asker.peer_id, target.peer_id)
            named = await asker.home.ask("providers", asker.peer_id, bytes.fromhex(model(target.held).digest))
        except GoneError:
            return
        except NetworkError as error:
            fault = error.message
        now = trio.current_time()
        if target.ended_at is not None or asker.ended_at is not None:
            return
        if fault:
            ages = f"target joined {now - target.joined_at:.0f} s ago, asker {now - asker.joined_at:.0f} s ago"
            self.result.failed.append(f"{fault} in {seconds:.1f} s: {ages}")
        else:
            self.result.lookups.append(seconds)
        holders &= {each.peer_id for each in self.living}
        if holders:
            self.result.provided.append(len(holders & {*named, asker.peer_id}) / len(holders))

    async def settle(self, seconds: float) -> None:
        """Wait until the coordinator's view is right, or for `seconds`."""
        self.result.is_settled = False
        with trio.move_on_after(seconds):
            while not self._is_right(self._seen()):  # noqa: ASYNC110 - a view has no event for it
                await trio.sleep(_GLANCE_S)
            self.result.is_settled = True

    def _is_right(self, seen: set[str]) -> bool:
        """Whether it is all that live and no other; who was joining when the time was up may be there or not."""
        return all((each.peer_id in seen) is (each.ended_at is None) for each in self.result.members)

    def _seen(self) -> set[str]:
        return {worker.peer_id for worker in self._view.workers()}


async def churn(options: Options) -> Result:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        program = Program("bootstrap", ["azu-bootstrap", "run", "--listen", LOOPBACK[0], "--data-dir", folder])
        try:
            ready = await trio.to_thread.run_sync(program.wait_for, "bootstrap node ready")
            return await _churn(options, list(ready["addrs"]), Path(folder))
        finally:
            program.kill()


async def _churn(options: Options, bootstrap: Sequence[str], folder: Path) -> Result:
    config = OverlayConfig(Identity.generate().seed, LOOPBACK, validators=VALIDATORS)
    async with (
        open_overlay(config) as overlay,
        open_processes("benchmarks.nodes") as start,
        trio.open_nursery() as nursery,
    ):
        view = SwarmView(overlay)
        await nursery.start(stay_joined, overlay, bootstrap)
        run = Churn(partial(start, NodeProcess, folder, bootstrap), view)
        for task in (view.run, run.watch):
            nursery.start_soon(task)
        for _ in range(options.nodes // options.per_process):
            await run.fill(options.per_process)
        await run.settle(AFTERWARDS_S)
        with trio.move_on_after(60 * options.minutes):
            await _come_and_go(run, options)
        await run.settle(AFTERWARDS_S)
        nursery.cancel_scope.cancel()
    return run.result


async def _come_and_go(run: Churn, options: Options) -> None:
    """In each period one process dies, and as many workers as it had leave one after the other."""
    period = 120 * options.per_process / (options.rate * options.nodes)  # seconds
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.look)
        while True:
            nursery.start_soon(run.fill, run.kill(freeze=options.freeze))
            for _ in range(options.per_process):
                nursery.start_soon(run.replace)
                await trio.sleep(period / options.per_process)


def report(result: Result) -> None:
    """Print a table, and what went wrong."""
    killed, left = result.gone(killed=True), result.gone(killed=False)
    seen = sorted(each.seen_at - each.joined_at for each in result.members if each.seen_at is not None)
    print("| | count | median | p99 | max | aim |\n| --- | --- | --- | --- | --- | --- |")
    rows = {
        "until a node has joined, s": ([each.join_seconds for each in result.members], ""),
        "until the coordinator sees it, s": (seen, ""),
        "until a killed worker is gone, s": (killed, f"{GONE_AIM_S:.0f}"),
        "until one that left is gone, s": (left, ""),
        "look-up of a record, s": (result.lookups, ""),
    }
    for name, (values, aim) in rows.items():
        if values:
            middle, high = statistics.median(values), sorted(values)[int(0.99 * (len(values) - 1))]
            print(f"| {name} | {len(values)} | {middle:.2f} | {high:.2f} | {max(values):.2f} | {aim} |")
    print(f"look-ups of live records that succeeded: {100 * result.found:.2f}% (aim: {100 * FOUND_AIM:.0f}%)")
    print(f"in the end the coordinator saw exactly those that lived: {'yes' if result.is_settled else 'NO'}")
    print(f"a model's live holders found by one look-up: {100 * statistics.mean(result.provided or [0]):.1f}%")
    for fault, count in Counter(result.failed).most_common(10):
        print(f"  failed: {fault} ({count})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.2, help="the share of the nodes that goes each minute")
    parser.add_argument("--per-process", type=int, default=3)
    parser.add_argument("--freeze", action="store_true", help="who dies hangs, and does not end")
    result = trio.run(churn, Options(**vars(parser.parse_args())))
    report(result)
    sys.exit(not result.holds)


if __name__ == "__main__":
    main()
