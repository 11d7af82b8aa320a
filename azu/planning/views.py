"""Workers' records and manifests as the planner sees them. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache

from azu.models.manifest import Manifest
from azu.models.memory import stage_memory
from azu.planning.snapshot import DIRECT, RELAYED, Link, Links, ModelShape, WorkerView
from azu.records import WorkerRecord
from azu.wire.tensors import ACTIVATIONS, ITEMSIZE, WeightFormat

__all__ = ["links_of", "network_of", "shape_of", "views_for"]

_LEAST_RTT_S = 0.0001  # who claims less gets no more jobs for it


def views_for(
    manifest: Manifest,
    workers: Iterable[WorkerRecord],
    faults: Callable[[str], int] = lambda _: 0,
    is_fixed: Callable[[WorkerRecord], bool] = lambda _: False,
) -> list[WorkerView]:
    """Workers as the planner sees them for one model; those busy with another model are left out.

    Args:
        is_fixed: whether a worker is given no other layers than it holds.
    """
    digest = manifest.digest
    views: list[WorkerView] = []
    for worker in workers:
        active = [held for held in worker.ranges if held.state != "cached"]  # in memory, or on its way
        if any(held.manifest != digest for held in active):
            continue
        held = next(((held.start, held.end) for held in active), None)
        ours = [each for each in worker.ranges if each.manifest == digest]
        views.append(
            WorkerView(
                peer_id=worker.peer_id,
                vram=worker.vram_total,
                held=held,
                ready=any(each.state == "loaded" for each in ours),
                cached=tuple((each.start, each.end) for each in ours if each.state == "cached"),
                jobs=worker.jobs,
                kv_tokens_free=worker.kv_tokens_free,
                network=network_of(worker.addrs),
                decode_s=(worker.speed.decode_base_ns + worker.speed.decode_token_ns) / 1e9 or worker.layer_us / 1e6,
                decode_job_s=worker.speed.decode_token_ns / 1e9,
                prefill_s=worker.speed.prefill_ns / 1e9,
                faults=faults(worker.peer_id),
                relayed=bool(worker.addrs) and all("/p2p-circuit" in addr for addr in worker.addrs),
                is_fixed=is_fixed(worker),
            )
        )
    return views


@lru_cache(maxsize=4096)  # each plan and each route asks again for every worker
def network_of(addrs: tuple[str, ...]) -> str:
    """The /16 (IPv6: /48) of the first public address: an outage often takes all of it. "" where there is none."""
    for addr in addrs:
        parts = addr.split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
            continue
        with suppress(ValueError):
            address = ipaddress.ip_address(parts[2])
            if address.is_global:
                size = 16 if address.version == 4 else 48
                return str(ipaddress.ip_network((address, size), strict=False))
    return ""


def links_of(manifest: Manifest, dtype: WeightFormat, workers: Iterable[WorkerRecord]) -> Links:
    """The lines between workers, as those at their beginnings measured them."""
    measured: dict[tuple[str, str], Link] = {}
    for worker in workers:
        for line in worker.links:
            usual = RELAYED if line.relayed else DIRECT
            rtt_s = max(line.rtt_us / 1e6, _LEAST_RTT_S) if line.rtt_us else usual.rtt_s
            measured[worker.peer_id, line.peer_id] = Link(rtt_s, line.bytes_per_s or usual.bandwidth)
    return Links(measured, hop_bytes=manifest.hidden_size * ITEMSIZE[ACTIVATIONS[dtype]])


@lru_cache(maxsize=64)
def shape_of(manifest: Manifest, dtype: WeightFormat, kv_tokens: int) -> ModelShape:
    """A model as the planner sees it, for stages in `dtype` with room for `kv_tokens` positions of KV cache."""

    @lru_cache(maxsize=4096)  # the planner asks for the same stages again and again
    def stage_bytes(start: int, end: int) -> int:
        return stage_memory(manifest, start, end, dtype, kv_tokens).total

    return ModelShape(manifest.n_layers, stage_bytes)
