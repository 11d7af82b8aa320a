"""Which layers of which model the swarm has loaded, by what its peers say. Pure.

A worker counts once for a layer, however often its record names it, and once in its best state for a model. What a
record claims beyond a model's end is ignored. Where coordinators disagree about a manifest's name or size, each version
is a model of its own here, as one of them lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from azu.dht.snapshot import Snapshot
from azu.dht.text import stretches
from azu.records import HeldRange, WorkerRecord

__all__ = ["STATES", "ModelView", "held_layers", "models_of", "names_of"]

STATES = ("loaded", "loading", "cached")  # the best first


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as the swarm holds it.

    model_id, n_layers: None where no coordinator offers this manifest; then the tuples end with the last layer named.
    replicas: by layer, the workers that have it loaded; loading: by layer, whether one is about to.
    workers: by state, the workers whose best state it is. offered_by: coordinators' peer ids.
    """

    manifest: str
    model_id: str | None
    n_layers: int | None
    replicas: tuple[int, ...]
    loading: tuple[bool, ...]
    workers: Mapping[str, int]
    offered_by: tuple[str, ...]

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """The [start, end) stretches that nobody has loaded."""
        return stretches([count == 0 for count in self.replicas])

    @property
    def is_complete(self) -> bool:
        """Whether every layer of the model is loaded somewhere; false where its size is unknown."""
        return bool(self.n_layers) and all(self.replicas)


def models_of(snapshot: Snapshot) -> tuple[ModelView, ...]:
    """Every model that a coordinator offers or a worker holds, by name; those without a name come last."""
    workers = [seen.record for seen in snapshot.workers]
    offers = _offers(snapshot)
    offered = {manifest for manifest, _, _ in offers}
    held = {held.manifest for worker in workers for held in worker.ranges}
    views = [_view(workers, *offer, tuple(sorted(peers))) for offer, peers in offers.items()]
    views += [_view(workers, manifest, None, None, ()) for manifest in held - offered]
    return tuple(sorted(views, key=lambda view: (view.model_id is None, view.model_id or "", view.manifest)))


def names_of(snapshot: Snapshot) -> dict[str, str]:
    """Model ids by manifest, where the coordinators agree on one."""
    names: dict[str, set[str]] = {}
    for manifest, model_id, _ in _offers(snapshot):
        names.setdefault(manifest, set()).add(model_id)
    return {manifest: next(iter(each)) for manifest, each in names.items() if len(each) == 1}


def held_layers(ranges: Iterable[HeldRange], manifest: str, state: str, n_layers: int) -> set[int]:
    """The layers of a model that one worker has in a state."""
    layers: set[int] = set()
    for held in ranges:
        if held.manifest == manifest and held.state == state:
            layers.update(range(held.start, min(held.end, n_layers)))
    return layers


def _offers(snapshot: Snapshot) -> dict[tuple[str, str, int], set[str]]:
    """Who offers what: (manifest, model id, layers) -> coordinators."""
    offers: dict[tuple[str, str, int], set[str]] = {}
    for seen in snapshot.coordinators:
        for offer in seen.record.models:
            key = (offer.manifest, offer.model_id, offer.n_layers)
            offers.setdefault(key, set()).add(seen.record.peer_id)
    return offers


def _view(
    workers: Iterable[WorkerRecord],
    manifest: str,
    model_id: str | None,
    n_layers: int | None,
    offered_by: tuple[str, ...],
) -> ModelView:
    holders = [w.ranges for w in workers if any(held.manifest == manifest for held in w.ranges)]
    ends = [held.end for ranges in holders for held in ranges if held.manifest == manifest]
    size = max(ends, default=0) if n_layers is None else n_layers
    by_worker = [{state: held_layers(ranges, manifest, state, size) for state in STATES} for ranges in holders]
    best = Counter(next((state for state in STATES if layers[state]), None) for layers in by_worker)
    replicas = Counter(layer for layers in by_worker for layer in layers["loaded"])
    return ModelView(
        manifest=manifest,
        model_id=model_id,
        n_layers=n_layers,
        replicas=tuple(replicas[layer] for layer in range(size)),
        loading=tuple(any(layer in layers["loading"] for layers in by_worker) for layer in range(size)),
        workers={state: best[state] for state in STATES},
        offered_by=offered_by,
    )
