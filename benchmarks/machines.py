"""A swarm of unequal machines as planners see it: drawn by a seed, the same each time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from azu.planning import Link, Links, ModelShape, WorkerView, layered
from azu.records import MAX_LINKS

__all__ = ["LAYERS", "large_model", "lines", "machines"]

GIB = 2**30
LAYERS = 126
# What people offer, in GiB, and how many of them.
_OFFERS = ((8, 25), (12, 25), (16, 20), (24, 20), (48, 7), (80, 3))


def large_model(n_layers: int = LAYERS) -> ModelShape:
    """Layers of 1.6 GiB, ends of 2 GiB more each: with 126 of them Llama 3.1 405B in 4 bits."""
    return layered([int(1.6 * GIB)] * n_layers, embedding=2 * GIB, head=2 * GIB, kv_bytes=4_096, kv_tokens=16_384)


def machines(count: int, seed: int) -> list[WorkerView]:
    """Workers that hold nothing: consumer cards to servers, speeds log-normal around 4 ms per layer, 300 networks."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        offer = chance.choices([size for size, _ in _OFFERS], [weight for _, weight in _OFFERS])[0]
        seconds = 0.004 * chance.lognormvariate(0, 0.5)
        found.append(
            WorkerView(
                f"peer{index:04}",
                int(offer * chance.uniform(0.7, 0.95) * GIB),
                kv_tokens_free=16_384,
                network=str(chance.randrange(300)),
                decode_s=seconds,
                decode_job_s=0.1 * seconds,
            )
        )
    return found


def lines(workers: Sequence[WorkerView], seed: int) -> Links:
    """Lines as records tell them: each worker measured some others; up to 20 ms, and two long-tailed access delays."""
    chance = random.Random(seed)
    delay = {worker.peer_id: 0.003 * chance.paretovariate(1.3) for worker in workers}
    measured = {}
    for worker in workers:
        for other in chance.sample(workers, min(MAX_LINKS, len(workers))):
            hop_s = chance.uniform(0, 0.02) + delay[worker.peer_id] + delay[other.peer_id]
            measured[worker.peer_id, other.peer_id] = Link(2 * hop_s, 12.5e6)
    return Links(measured)
