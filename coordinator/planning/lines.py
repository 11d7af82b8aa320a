"""What a job's hops cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from azu.planning.snapshot import Demand, Link, Links, WorkerView

__all__ = ["HANDLING_S", "Lines", "nanoseconds"]

# What a hop costs beside its line: frames, and waking the next process (docs/performance.md). Without it, lines that
# were measured a little too short would lead jobs through workers that they do not need, and that could stand in.
HANDLING_S = 0.002


def nanoseconds(seconds: float) -> int:
    """Whole ones: sums of them do not depend on the order, so that equal paths are equal."""
    return round(seconds * 1e9)


class Lines:
    """What a job's hops cost between workers, by their places, in nanoseconds: a sum for each two, or as measured.

    Attributes:
        ends: what a worker's end of a line costs that was not measured. wires: what its bandwidth does, direct and
            relayed.
        into: to each worker, the costs of the lines that were measured, by the place of the other. out_of: from it.
    """

    def __init__(self, workers: Sequence[WorkerView], links: Links, demand: Demand) -> None:
        self._demand = demand
        self._bytes = links.hop_bytes
        self.relayed = [worker.relayed for worker in workers]
        ends = [Link(links.away_s(worker), math.inf) for worker in workers]
        wires = [Link(2 * HANDLING_S, line.bandwidth) for line in (links.direct, links.relayed)]
        self.ends, self._ends_back = [self._cost(each) for each in ends], [self._back(each) for each in ends]
        self.wires, self._wires_back = [self._cost(each) for each in wires], [self._back(each) for each in wires]
        self.into: list[dict[int, int]] = [{} for _ in workers]
        self.out_of: list[dict[int, int]] = [{} for _ in workers]
        self._into_back: list[dict[int, int]] = [{} for _ in workers]
        places = {worker.peer_id: place for place, worker in enumerate(workers)}
        for (one, other), link in links.measured.items():
            if one in places and other in places and one != other:
                start, end = places[one], places[other]
                link = Link(link.rtt_s + 2 * HANDLING_S, link.bandwidth)
                self.into[end][start] = self.out_of[start][end] = self._cost(link)
                self._into_back[end][start] = self._back(link)

    def _cost(self, link: Link) -> int:
        """From a stage to the next: of the prompt's positions at once, and then of each token."""
        prompt = self._demand.prompt
        return self._back(link) + (nanoseconds(link.hop_s(prompt * self._bytes)) if prompt else 0)

    def _back(self, link: Link) -> int:
        """From the last stage to the first: of each token."""
        return nanoseconds(self._demand.tokens * link.hop_s(self._bytes))

    def back(self, last: int, first: int) -> int:
        """What the hop costs that closes a ring."""
        known = self._into_back[first].get(last)
        wire = self._wires_back[self.relayed[last] or self.relayed[first]]
        return known if known is not None else self._ends_back[last] + self._ends_back[first] + wire

    def least_back(self, first: int) -> int:
        """No hop that closes a ring at this worker costs less."""
        least = self._ends_back[first] + min(self._ends_back) + min(self._wires_back)
        return min([least, *self._into_back[first].values()])
