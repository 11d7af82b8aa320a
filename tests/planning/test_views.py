"""Worker records as the planner sees them."""

from __future__ import annotations

import pytest

from azu.planning import network_of, views_for
from tests.worker_records import MANIFEST, OTHER, OURS, worker


@pytest.mark.parametrize(
    ("ranges", "held", "ready", "cached"),
    [
        ([], None, False, ()),
        ([(OURS, 0, 4, "loaded")], (0, 4), True, ()),
        ([(OURS, 0, 4, "loading")], (0, 4), False, ()),
        ([(OURS, 0, 4, "cached")], None, False, ((0, 4),)),
        ([(OURS, 0, 4, "cached"), (OURS, 2, 3, "loaded")], (2, 3), True, ((0, 4),)),
        ([(OTHER, 0, 4, "cached")], None, False, ()),
        ([(OTHER, 0, 4, "cached"), (OURS, 5, 9, "loaded")], (5, 9), True, ()),
    ],
)
def test_what_a_worker_holds_of_a_model(
    ranges: list[tuple[str, int, int, str]], held: object, ready: bool, cached: object
) -> None:
    (view,) = views_for(MANIFEST, [worker(1, *ranges)])
    assert (view.held, view.ready, view.cached) == (held, ready, cached)
    assert (view.vram, view.jobs, view.kv_tokens_free) == (100, 3, 7)


def test_what_a_worker_measured_and_where_it_is() -> None:
    relayed = "/ip4/198.18.0.1/tcp/4001/p2p/12D3KooWRelay/p2p-circuit"
    speed = {"decode_base_ns": 1_000_000, "decode_token_ns": 500_000, "prefill_ns": 40_000}
    record = worker(1, speed=speed, addrs=("/ip4/192.168.1.2/tcp/4001", relayed, "/ip4/8.8.4.4/tcp/4001"))
    (view,) = views_for(MANIFEST, [record], lambda peer_id: 3 if peer_id == record.peer_id else 0)
    assert (view.decode_s, view.network, view.faults, view.relayed) == (0.0015, "8.8.0.0/16", 3, False)
    assert (view.decode_job_s, view.prefill_s) == (0.0005, 0.00004)
    (view,) = views_for(MANIFEST, [worker(1, layer_us=1_500)])
    assert view.decode_s == 0.0015, "an older worker"
    (view,) = views_for(MANIFEST, [worker(1, addrs=(relayed,))])
    assert (view.decode_s, view.network, view.relayed) == (0.0, "", True)


@pytest.mark.parametrize(
    ("addr", "network"),
    [
        ("/ip6/2606:4700:1:2::3/tcp/1", "2606:4700:1::/48"),
        ("/ip4/127.0.0.1/tcp/1", ""),
        ("/dns4/example.org/tcp/1", ""),
        ("/ip4/999.1.1.1/tcp/1", ""),
        ("garbage", ""),
        ("/ip4", ""),
        ("", ""),
    ],
)
def test_a_network_is_that_of_a_public_address(addr: str, network: str) -> None:
    assert network_of((addr,)) == network


@pytest.mark.parametrize("state", ["loaded", "loading"])
def test_a_worker_that_is_busy_with_another_model_is_left_out(state: str) -> None:
    busy = worker(1, (OTHER, 0, 4, state), (OURS, 0, 4, "cached"))
    free = worker(2)
    assert [view.peer_id for view in views_for(MANIFEST, [busy, free])] == [free.peer_id]
