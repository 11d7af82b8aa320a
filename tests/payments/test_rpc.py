"""RPCs that fail, lie, dawdle and limit, in front of a real chain; the next URL steps in."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from azu.errors import InputError, NetworkError
from azu.payments.answers import digest, quantity
from azu.payments.hyperliquid import chain_check
from azu.payments.rpc import Limits, Rpc, RpcError
from tests.payments.anvil import CHAIN_ID, Chain
from tests.payments.http_server import Reply
from tests.payments.proxy import Proxy, open_proxy

SHORT = Limits(request_s=0.5, patience_s=1.0)


@asynccontextmanager
async def opened(*urls: str, limits: Limits = SHORT) -> AsyncIterator[Rpc]:
    with trio.fail_after(60):
        async with Rpc(urls, chain_check(CHAIN_ID), limits=limits) as rpc:
            yield rpc


@pytest.fixture
def second(chain: Chain) -> Iterator[Proxy]:
    with open_proxy(chain.url) as proxy:
        yield proxy


FAULTS: dict[str, tuple[Callable[[Proxy], None], str]] = {
    "slow": (lambda proxy: proxy.slow_down(1.0), "rpc_timeout"),
    "429": (Proxy.rate_limit, "rpc_rate_limited"),
    "-32005": (Proxy.rate_limit_in_json, "rpc_rate_limited"),
    "another chain": (lambda proxy: proxy.answer("eth_chainId", "0x1"), "rpc_wrong_chain"),
    "500": (lambda proxy: setattr(proxy, "before", lambda _: Reply(b"{}", 500)), "rpc_unavailable"),
    "hangs up": (lambda proxy: setattr(proxy, "before", lambda _: Reply(None)), "rpc_unavailable"),
    "html": (lambda proxy: setattr(proxy, "before", lambda _: Reply(b"<html>")), "rpc_bad_answer"),
    "deep": (lambda proxy: setattr(proxy, "before", lambda _: Reply(b"[" * 100_000)), "rpc_bad_answer"),
    "other question": (
        lambda proxy: setattr(proxy, "before", lambda _: Reply(b'{"id": 0, "result": 1}')),
        "rpc_bad_answer",
    ),
    "endless": (lambda proxy: setattr(proxy, "before", lambda _: Reply(b" " * (5 << 20))), "rpc_bad_answer"),
    "no number": (lambda proxy: proxy.answer("eth_blockNumber", "soon"), "rpc_bad_answer"),
    "nothing": (lambda proxy: proxy.answer("eth_blockNumber", None), "rpc_bad_answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_next_url_steps_in_and_without_one_the_reason_is_told(
    proxy: Proxy, second: Proxy, chain: Chain, fault: str, recwarn: pytest.WarningsRecorder
) -> None:
    break_it, code = FAULTS[fault]
    break_it(proxy)
    async with opened(proxy.url, second.url) as rpc:
        assert await rpc.call("eth_blockNumber", read=quantity) == int(chain.ask("eth_blockNumber"), 16)
    async with opened(f"{proxy.url}/secret?key=hidden") as rpc:
        with pytest.raises(NetworkError) as caught:
            await rpc.call("eth_blockNumber", read=quantity)
    assert caught.value.code == code
    assert "127.0.0.1" in caught.value.message
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    gc.collect()
    left_open = [str(warning.message) for warning in recwarn if warning.category is ResourceWarning]
    assert not left_open


async def test_an_rpc_that_failed_is_left_alone_and_then_asked_again(proxy: Proxy, second: Proxy) -> None:
    proxy.rate_limit()
    async with opened(proxy.url, second.url) as rpc:
        for _ in range(5):
            await rpc.call("eth_blockNumber", read=quantity)
        assert proxy.asked == ["eth_chainId"]
        proxy.heal()
        while "eth_blockNumber" not in proxy.asked:
            await trio.sleep(0.1)
            await rpc.call("eth_blockNumber", read=quantity)
        assert proxy.asked[-2:] == ["eth_chainId", "eth_blockNumber"]  # it may be another node now


async def test_a_single_rpc_is_asked_again_within_the_patience(proxy: Proxy) -> None:
    replies = iter([Reply(b"", 503), Reply(b"", 503)])
    proxy.before = lambda question: next(replies, None)
    async with opened(proxy.url, limits=Limits(5, 30)) as rpc:
        assert await rpc.call("eth_blockNumber", read=quantity) >= 0


async def test_a_nodes_own_error_is_passed_on_at_once(proxy: Proxy, second: Proxy) -> None:
    async with opened(proxy.url, second.url) as rpc:
        with pytest.raises(RpcError) as caught:
            await rpc.call("eth_sendRawTransaction", "0x00", read=digest)
        assert caught.value.number
        with pytest.raises(RpcError, match="not found"):
            await rpc.call("eth_nothing", read=digest)
    assert second.asked == []


async def test_everywhere_needs_everybody(proxy: Proxy, second: Proxy) -> None:
    async with opened(proxy.url, second.url) as rpc:
        heads = await rpc.everywhere(lambda node: node.call("eth_blockNumber", read=quantity))
        assert len(heads) == 2
        second.rate_limit()
        with pytest.raises(NetworkError):
            await rpc.everywhere(lambda node: node.call("eth_blockNumber", read=quantity))


async def test_questions_are_json_rpc(proxy: Proxy) -> None:
    seen: list[dict[str, object]] = []
    proxy.before = seen.append
    async with opened(proxy.url) as rpc:
        await rpc.call("eth_getBalance", "0x" + "11" * 20, "latest", read=quantity)
    assert json.loads(json.dumps(seen[-1])) == {
        "jsonrpc": "2.0", "id": 2, "method": "eth_getBalance", "params": ["0x" + "11" * 20, "latest"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "url", ["", "example.org", "ftp://example.org", "http://", "http://h:99999", "http://[::1", "//h"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Rpc([url], chain_check(1))
    assert caught.value.code == "bad_rpc_url"


def test_too_many_urls_are_refused() -> None:
    with pytest.raises(InputError):
        Rpc([], chain_check(1))
    with pytest.raises(InputError):
        Rpc(["http://h"] * 17, chain_check(1))
