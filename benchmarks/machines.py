"""A swarm of unequal machines as planners see it: drawn by a seed, the same each time."""

from __future__ import annotations

import random

from azu.planning import ModelShape, WorkerView, layered

__all__ = ["LAYERS", "large_model", "machines"]

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
