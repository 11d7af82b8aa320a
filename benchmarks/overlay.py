"""Join time, look-ups in swarms of growing size, and what the ways to a peer cost.

    python -m benchmarks.overlay [--sizes 10,20,40,80] [--lookups 100] [--rounds 3] [--mib 64]

The swarms are real nodes on loopback, several to a process. A look-up finds the peers closest to a key that was chosen
by chance; its hops are how many peers had to be asked, one after the other, before the closest one was known. The ways
(direct, relayed, hole punched) need network namespaces, so Linux and root; without them that part is left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from benchmarks.links import measure_links
from benchmarks.nodes import NodeProcess
from benchmarks.processes import Process, open_processes
from tests.netlab import why_not

PER_PROCESS = 5
ROUND_TRIPS = 400
WIDTH = 40  # characters of the longest bar


@dataclass(frozen=True, slots=True)
class Size:
    """What was measured with so many nodes, medians and means over the look-ups; seconds."""

    nodes: int
    join: float
    hops: float
    asked: float
    seconds: float


async def grow(sizes: Sequence[int], lookups: int) -> list[Size]:
    """A swarm that grows from size to size."""
    chance = random.Random(7)
    measured: list[Size] = []
    with tempfile.TemporaryDirectory() as folder:
        async with open_processes("benchmarks.nodes") as start:
            nodes: list[tuple[Process, str]] = []
            bootstrap = await start(NodeProcess, Path(folder), ()).ask("found")
            for size in sizes:
                joins: list[float] = []
                while len(nodes) < size:
                    process = start(NodeProcess, Path(folder), bootstrap)
                    for _ in range(min(PER_PROCESS, size - len(nodes))):
                        peer_id, seconds = await process.ask("join", None)
                        nodes.append((process, peer_id))
                        joins.append(seconds)
                found: list[tuple[int, int, float]] = []
                for _ in range(lookups):
                    process, peer_id = chance.choice(nodes)
                    found.append(await process.ask("trace", peer_id, chance.randbytes(32)))
                hops, asked, seconds_each = zip(*found, strict=True)
                measured.append(
                    Size(size, statistics.median(joins), statistics.mean(hops), statistics.mean(asked),
                         statistics.median(seconds_each))
                )  # fmt: skip
    return measured


def report_sizes(measured: Sequence[Size]) -> None:
    """A table, and a plot in which logarithmic growth is a straight edge, as each row has twice the nodes."""
    print("| nodes | join ms | look-up ms | hops | peers asked |\n| --- | --- | --- | --- | --- |")
    for each in measured:
        print(
            f"| {each.nodes} | {1000 * each.join:.0f} | {1000 * each.seconds:.0f} | {each.hops:.2f} "
            f"| {each.asked:.1f} |"
        )
    for name, values in (
        ("look-up ms", [1000 * each.seconds for each in measured]),
        ("hops", [each.hops for each in measured]),
    ):
        print(f"\n{name} against nodes")
        for each, value in zip(measured, values, strict=True):
            print(f"{each.nodes:>5} {'#' * max(1, round(WIDTH * value / max(values)))} {value:.1f}")


def report_links(found: dict[str, list[tuple[float, float]]], mib: int) -> None:
    """A table of medians, and of the medians of the ratios to plain TCP in the same round."""
    print(f"\n| | 8 KiB round trip ms | ratio | {mib} MiB, MB/s | ratio |\n| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        slower = statistics.median(own[0] / tcp[0] for own, tcp in zip(runs, found["plain TCP"], strict=True))
        share = statistics.median(own[1] / tcp[1] for own, tcp in zip(runs, found["plain TCP"], strict=True))
        seconds, rate = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {name} | {1000 * seconds:.2f} | {slower:.1f} | {rate / 1e6:.0f} | {share:.2f} |")


async def run(sizes: Sequence[int], lookups: int, rounds: int, mib: int) -> None:
    """All of it."""
    report_sizes(await grow(sizes, lookups))
    if reason := why_not():
        print(reason)
        return
    async with open_processes("benchmarks.links") as start:
        report_links(await measure_links(start, rounds, ROUND_TRIPS, mib << 20), mib)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10,20,40,80", help="numbers of nodes, ascending")
    parser.add_argument("--lookups", type=int, default=100, help="at each size")
    parser.add_argument("--rounds", type=int, default=3, help="of the ways")
    parser.add_argument("--mib", type=int, default=64, help="sent for the rate")
    options = parser.parse_args()
    trio.run(run, [int(each) for each in options.sizes.split(",")], options.lookups, options.rounds, options.mib)


if __name__ == "__main__":
    main()
