"""The most tokens per second that can go through all layers, where workers run any parts of what they hold.

A linear program: how many tokens take which chain of parts, where no worker is busy for more than a second in each
second. It has a row for each worker, and chains beyond number, which are looked for as they are needed: with a price
for each worker's second, the chain that costs a token the least is the best one to add (column generation, after Ford
and Fulkerson, 1958), and the program with those that are known is solved by the simplex method.

Jobs change over only where the layers of the one that they leave end, or those of the next one begin: from any other
border there is a way to one of the two along which no token costs more, as a part's time grows evenly with its layers.

At the best prices, which sum up to the tokens per second, a token's way to each border has a price too. What a worker
earns with a part is what that adds to it, for as many tokens as the worker can run; no plan in which it holds other
layers gives more than what the others earn and what it would (weak duality). That says who should hold what instead.

Complexity: for each chain O(W²) for W workers, and a look at each worker's parts between those borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from azu.planning.snapshot import Range
from azu.planning.steps import Steps

__all__ = ["Parts"]

_Part = tuple[int, int, int]  # worker, start, end

_NOTHING = 1e-7
_CLOSE = 1e-4  # how far what is found may be below the most there is, as a share of it
_LOSS = -1.0  # what a token is worth that takes a part that nobody holds any more
_FAR = 1e9
_CHAINS_A_STEP = 4
_MOST_CHAINS = 2_000  # looked for at a time, however slowly they become better


class Parts:
    """A plan, and what flows through it. Workers are numbers.

    Attributes:
        held: by worker. chains: that were looked for, by this one and those that it was copied from.
    """

    def __init__(self, seconds: Sequence[Sequence[float]]) -> None:
        """`seconds` of each worker for a token through so many layers, 1 or so; nobody holds anything yet."""
        count = len(seconds)
        self._seconds = seconds
        self.n_layers = len(seconds[0]) - 1
        self.held: list[Range | None] = [None] * count
        self.chains = 0
        # A basis: for each of its chains, where a chain () is a worker's spare time, what a token is worth and how many
        # take it; the inverse of its matrix, by columns; and what is therefore a worker's second worth.
        self._basis: list[Sequence[_Part]] = [()] * count
        self._worth = [0.0] * count
        # Workers have unequal time to spare, by next to nothing, so that no two chains come to their end at once.
        self._tokens = [1.0 + _NOTHING * (worker + 1) / count for worker in range(count)]
        self._inverse = [[float(row == column) for row in range(count)] for column in range(count)]
        self._prices = [0.0] * count

    def copy(self) -> Parts:
        """Another one, to go on from here."""
        other = Parts.__new__(Parts)
        other.__dict__.update(self.__dict__)
        other.held, other._basis, other._worth = self.held.copy(), self._basis.copy(), self._worth.copy()
        other._inverse = self._inverse.copy()
        return other

    def give(self, worker: int, range_: Range | None) -> None:
        """Have a worker hold these layers and no others."""
        self.held[worker] = range_
        first, last = range_ or (0, 0)
        for row, chain in enumerate(self._basis):
            if any(owner == worker and not first <= start < end <= last for owner, start, end in chain):
                self._prices = [
                    price + (_LOSS - self._worth[row]) * column[row]
                    for price, column in zip(self._prices, self._inverse, strict=True)
                ]
                self._worth[row] = _LOSS

    def flow(self, above: float = 0.0) -> Steps[float]:
        """Tokens per second, less a ten-thousandth at most; or no more than `above`, as soon as that is certain."""
        borders, into = self._between()
        bound = _FAR
        for number in range(_MOST_CHAINS):
            if not number % _CHAINS_A_STEP:
                yield
            self.chains += 1
            if (least := min(self._prices)) < -_NOTHING:
                worker = self._prices.index(least)
                self._enter((), 0.0, -least, self._inverse[worker])
                continue
            found = sum(self._prices)
            cost, chain, column = self._cheapest(borders, into)
            if cost >= _FAR:
                return 0.0
            if cost > 0:
                bound = min(bound, found / cost)
            if bound <= above:
                return bound
            if found >= bound * (1 - _CLOSE):
                break
            self._enter(chain, 1.0, 1 - cost, column)
        return sum(self._prices)

    def _between(self) -> tuple[list[int], list[list[tuple[int, int, float]]]]:
        """The borders at which jobs may change over, and the parts that end at each: from which, whose, how long."""
        held = [range_ for range_ in self.held if range_]
        begin, stop = {0, *(start for start, _ in held)}, {self.n_layers, *(end for _, end in held)}
        borders = sorted(begin | stop)
        number = {border: index for index, border in enumerate(borders)}
        into: list[list[tuple[int, int, float]]] = [[] for _ in borders]
        for worker, range_ in enumerate(self.held):
            if range_:
                first, last = range_
                times = self._seconds[worker]
                within = borders[number[first] : number[last] + 1]
                starts = [border for border in within if border == first or border in stop]
                for end in within[1:]:
                    if end == last or end in begin:
                        into[number[end]] += [(number[at], worker, times[end - at]) for at in starts if at < end]
        return borders, into

    def _cheapest(
        self, borders: Sequence[int], into: Sequence[Sequence[tuple[int, int, float]]]
    ) -> tuple[float, list[_Part], list[float]]:
        """The chain that costs the least, what it costs, and its column of the program."""
        prices = self._prices
        costs = [0.0]
        last: list[tuple[int, int, float]] = [(0, 0, 0.0)]
        for parts in into[1:]:
            each = [costs[at] + prices[worker] * time for at, worker, time in parts]
            costs.append(min(each, default=_FAR))
            last.append(parts[each.index(costs[-1])] if each else (0, 0, 0.0))
        chain: list[_Part] = []
        column = [0.0] * len(prices)
        end = len(borders) - 1
        while end and costs[-1] < _FAR:
            at, worker, time = last[end]
            chain.append((worker, borders[at], borders[end]))
            column = [sum_ + time * each for sum_, each in zip(column, self._inverse[worker], strict=True)]
            end = at
        return costs[-1], chain, column

    def _enter(self, chain: Sequence[_Part], worth: float, gain: float, column: Sequence[float]) -> None:
        """Let as many tokens take a chain as can, instead of the one that has none left first; each is a gain."""
        tokens, row = min(
            (have / less, row)
            for row, (have, less) in enumerate(zip(self._tokens, column, strict=True))
            if less > _NOTHING
        )
        self._tokens = [have - tokens * less for have, less in zip(self._tokens, column, strict=True)]
        self._tokens[row] = tokens
        self._prices = prices = self._prices.copy()
        for worker, old in enumerate(self._inverse):
            if old[row]:
                share = old[row] / column[row]
                new = [each - share * less for each, less in zip(old, column, strict=True)]
                new[row] = share
                self._inverse[worker] = new
                prices[worker] += gain * share
        self._basis[row], self._worth[row] = chain, worth

    def tolls(self) -> list[float]:
        """What a token's way to each border costs, of 1 to the last one; if nobody holds some layers, only these do."""
        holes = [1.0] * self.n_layers
        for range_ in self.held:
            if range_:
                holes[range_[0] : range_[1]] = [0.0] * (range_[1] - range_[0])
        if any(holes):
            upto = [0.0]
            for hole in holes:
                upto.append(upto[-1] + hole)
            return [each / upto[-1] for each in upto]
        stop = {range_[1] for range_ in self.held if range_}
        from_: list[list[tuple[int, int]]] = [[] for _ in range(self.n_layers + 1)]
        for worker, range_ in enumerate(self.held):
            if range_:
                first, last = range_
                starts = [border for border in range(first, last) if border == first or border in stop]
                for end in range(first + 1, last + 1):
                    from_[end] += [(start, worker) for start in starts if start < end]
        costs = [0.0]
        for end, parts in enumerate(from_[1:], 1):
            costs.append(min([costs[at] + self._prices[who] * self._seconds[who][end - at] for at, who in parts]))
        return [each / costs[-1] for each in costs] if costs[-1] else costs

    def earnings(self, worker: int, tolls: Sequence[float], ranges: Sequence[Range]) -> Iterator[float]:
        """What it would earn at most with each of these ranges, none within another and in their order."""
        times = self._seconds[worker]
        best = [0.0] * self.n_layers  # with a part that begins at each layer
        upto = 0
        for first, last in ranges:
            for end in range(max(upto, first) + 1, last + 1):
                toll = tolls[end]
                for start in range(first, end):
                    if (earned := (toll - tolls[start]) / times[end - start]) > best[start]:
                        best[start] = earned
            upto = last
            yield max(best[first:last])
