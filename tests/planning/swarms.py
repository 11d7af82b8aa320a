"""Models and workers for the planner's tests, and what any plan has to hold to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from azu.planning import Links, ModelShape, Placement, WorkerView
from azu.planning.filling import find_chain
from azu.planning.flow import largest_flow
from azu.planning.parts import Parts
from azu.planning.snapshot import powers
from azu.planning.steps import finish
from coordinator.planning import find_route

Range = tuple[int, int]

LAYER = 10


def uniform(n_layers: int, embedding: int = 0, head: int = 0) -> ModelShape:
    """A model of equal layers; embeddings weigh on its first stage, the head on its last."""
    return sized([LAYER] * n_layers, embedding, head)


def sized(layers: Sequence[int], embedding: int = 0, head: int = 0) -> ModelShape:
    count = len(layers)

    def stage_bytes(start: int, end: int) -> int:
        assert 0 <= start < end <= count, "no such stage; the real estimate raises"
        return sum(layers[start:end]) + embedding * (start == 0) + head * (end == count)

    return ModelShape(count, stage_bytes)


def idle(*vrams: int) -> list[WorkerView]:
    return [WorkerView(f"w{index}", vram) for index, vram in enumerate(vrams)]


def route(n_layers: int, workers: Sequence[WorkerView], tokens: int) -> tuple[Placement, ...] | None:
    found = find_route(n_layers, workers, tokens, parts=True)
    return found.stages if found else None


def holding(peer_id: str, start: int, end: int, *, vram: int = 10_000, **changes: object) -> WorkerView:
    return WorkerView(peer_id, vram, held=(start, end), **changes)  # type: ignore[arg-type]


def flow(n_layers: int, workers: Sequence[WorkerView]) -> float:
    """The most tokens per second in parts of what workers hold: tests/planning/test_parts.py shows that it is."""
    power = powers(workers, Links())
    seconds = [[0.0, *(1 / power[w.peer_id].rate(n, n_layers) for n in range(1, n_layers + 1))] for w in workers]
    unit = max((each[-1] for each in seconds), default=0.0)
    if not unit:
        return 0.0  # nobody is there
    parts = Parts([[each / unit for each in times] for times in seconds])
    for number, worker in enumerate(workers):
        parts.give(number, worker.held)
    return finish(parts.flow()) / unit


def whole_flow(n_layers: int, workers: Sequence[WorkerView]) -> float:
    """The same where each worker runs all that it holds."""
    power = powers(workers, Links())
    held = [(w.held, power[w.peer_id].rate(w.held[1] - w.held[0], n_layers)) for w in workers if w.held]
    return largest_flow(n_layers, held)


def ranges(plan: Sequence[Placement]) -> list[Range]:
    return sorted((placement.start, placement.end) for placement in plan)


def after(workers: Sequence[WorkerView], plan: Sequence[Placement]) -> list[WorkerView]:
    """The workers once the plan was carried out."""
    given_out = {placement.peer_id: (placement.start, placement.end) for placement in plan}
    return [replace(w, held=given_out.get(w.peer_id, w.held), ready=True, kv_tokens_free=100) for w in workers]


def assert_fits(shape: ModelShape, workers: Sequence[WorkerView], plan: Sequence[Placement]) -> None:
    vram = {worker.peer_id: worker.vram for worker in workers}
    assert len({placement.peer_id for placement in plan}) == len(plan), "a worker was given two ranges"
    for placement in plan:
        assert 0 <= placement.start < placement.end <= shape.n_layers
        assert shape.stage_bytes(placement.start, placement.end) <= vram[placement.peer_id]


def primary(shape: ModelShape, workers: Sequence[WorkerView]) -> list[Placement]:
    """The chain that a plan begins with, where nobody holds anything yet."""
    found = find_chain(shape, sorted(workers, key=lambda worker: worker.peer_id), powers(workers, Links()))
    return sorted(found or (), key=lambda placement: placement.start)


def assert_covers_once(n_layers: int, chain: Sequence[Placement]) -> None:
    assert [layer for placement in chain for layer in range(placement.start, placement.end)] == list(range(n_layers))


def cuts(n_layers: int, stages: int) -> Iterator[list[Range]]:
    for inner in combinations(range(1, n_layers), stages - 1):
        yield list(zip((0, *inner), (*inner, n_layers), strict=True))
