"""Health and metrics over real HTTP, and what a browser or a stranger gets instead."""

from __future__ import annotations

import json
import re
import socket
import time

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from azu.errors import InputError
from azu.identity import Identity
from azu.metrics import Metric, overlay_metrics, render, serve_metrics
from azu.overlay import OverlayConfig, RelayLimits, open_overlay

LINE = re.compile(rb'azu_[a-z_]+(\{[a-z]+="(\\.|[^"\\\n])*"\})? -?[0-9.e+inf-]+')


def config(number: int) -> OverlayConfig:
    return OverlayConfig(Identity(bytes([number]) * 32).seed, ("/ip4/127.0.0.1/tcp/0",), relay=RelayLimits())


async def test_what_an_operator_sees() -> None:
    with trio.fail_after(60):
        async with open_overlay(config(1)) as one, open_overlay(config(2)) as other, trio.open_nursery() as nursery:
            url = await nursery.start(serve_metrics, one, ("127.0.0.1", 0), "azu-test/1")
            await other.bootstrap([one.addrs[0]])
            async with httpx.AsyncClient(trust_env=False) as client:
                health = (await client.get(f"{url}/healthz")).json()
                assert health["status"] == "ok"
                assert health["peer_id"] == one.peer_id
                answer = await client.get(f"{url}/metrics")
                assert answer.headers["content-type"] == "text/plain; version=0.0.4"
                assert "azu_connections 1\n" in answer.text
                assert "azu_relay_bytes_total 0\n" in answer.text
                assert all(line.startswith(b"#") or LINE.fullmatch(line) for line in answer.content.splitlines())
                assert (await client.get(f"{url}/other")).status_code == 404
                assert (await client.post(f"{url}/metrics")).status_code == 405
                rebound = await client.get(f"{url}/metrics", headers={"Host": "evil.example"})
                assert rebound.status_code == 403
            with pytest.raises(InputError, match="cannot serve metrics"):
                await serve_metrics(one, ("127.0.0.1", int(url.rsplit(":", 1)[1])), "azu-test/1")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "sent", [b"\x00" * 100, b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"x" * 20_000, b"GET /\r\n\r\n"]
)
async def test_garbage_is_answered_or_cut_off(sent: bytes) -> None:
    with trio.fail_after(60):
        async with open_overlay(config(1)) as overlay, trio.open_nursery() as nursery:
            url = await nursery.start(serve_metrics, overlay, ("127.0.0.1", 0), "azu-test/1")
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rsplit(":", 1)[1]))
            await stream.send_all(sent)
            got = b""
            try:
                while part := await stream.receive_some():
                    got += part
            except trio.BrokenResourceError:
                got += b""  # cut off
            assert got[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 403")
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{url}/healthz")).status_code == 200
            nursery.cancel_scope.cancel()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="THIS MACHINE HAS NO IPv6: the address is not tried")
async def test_an_ipv6_address_is_served_under_its_own_name() -> None:
    with trio.fail_after(60):
        async with open_overlay(config(1)) as overlay, trio.open_nursery() as nursery:
            url = await nursery.start(serve_metrics, overlay, ("::1", 0), "azu-test/1")
            assert url.startswith("http://[::1]:")
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{url}/healthz")).status_code == 200
                assert (await client.get(f"{url}/status")).status_code == 404  # it has none
            nursery.cancel_scope.cancel()


async def test_all_metrics_are_finite() -> None:
    async with open_overlay(config(1)) as overlay:
        metrics = overlay_metrics(overlay, time.time() - 5, "azu-test/1")
        values = [
            v for each in metrics for v in (each.value.values() if isinstance(each.value, dict) else [each.value])
        ]
        assert all(value >= 0 for value in values)
        assert json.dumps(values)


@given(label=st.text(max_size=20), value=st.floats(allow_nan=False, allow_infinity=False))
def test_labels_cannot_break_a_line(label: str, value: float) -> None:
    lines = render([Metric("x", "Something.", "gauge", {label: value}, "by")]).split(b"\n")
    assert len(lines) == 4
    assert float(lines[2].rsplit(b" ", 1)[1]) == value
