from __future__ import annotations

import json
import socket
from functools import partial

import httpx
import openai
import pytest
import trio

from azu.errors import InputError
from coordinator.api import ApiSettings, create_app, serve_http
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import MODEL_ID, Twin

LIMIT = 30.0  # seconds; only keeps a hung test from hanging the run
# What hanging up must free within a second, on a machine that does other work besides.
PROMPTLY = 5.0

BODY = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hello"}]}


async def send_request(url: str, **changes: object) -> trio.SocketStream:
    host, port = url.removeprefix("http://").split(":")
    stream = await trio.open_tcp_stream(host, int(port))
    body = json.dumps({**BODY, **changes}).encode()
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}", "", ""]
    await stream.send_all("\r\n".join(head).encode() + body)
    return stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
async def test_a_client_that_hangs_up_cancels_the_job(url: str, twin: Twin, stream: bool, tokens: int) -> None:
    twin.stall_after = tokens
    connection = await send_request(url, stream=stream, n=2)
    with trio.fail_after(LIMIT):
        await twin.stalled.wait()
        if stream and tokens:
            assert b"200" in await connection.receive_some()
    await connection.aclose()
    with trio.fail_after(PROMPTLY):
        await twin.left_one.wait()
        while twin.left < 2:
            await trio.sleep(0.01)
    assert twin.finished == 0


async def test_closing_the_openai_stream_cancels_the_job(client: openai.OpenAI, twin: Twin) -> None:
    twin.stall_after = 8

    def ask() -> None:
        with client.chat.completions.create(**BODY, stream=True) as chunks:  # type: ignore[call-overload]
            next(chunks)
            next(chunks)

    await in_thread(ask)
    with trio.fail_after(PROMPTLY):
        await twin.left_one.wait()


async def test_port_in_use(twin: Twin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"in use.*port 0") as caught:
        await serve_http(create_app(twin, ApiSettings()), "127.0.0.1", taken.getsockname()[1])
    assert caught.value.code == "cannot_listen"


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 99_999)])
async def test_bad_addresses(twin: Twin, host: str, port: int) -> None:
    with pytest.raises(InputError, match="cannot listen on"):
        await serve_http(create_app(twin, ApiSettings()), host, port)


async def test_wildcard_is_reported_as_loopback(nursery: trio.Nursery, twin: Twin) -> None:
    url = await nursery.start(partial(serve_http, create_app(twin, ApiSettings()), "0.0.0.0", 0))
    assert url.startswith("http://127.0.0.1:")
    response = await in_thread(lambda: httpx.get(f"{url}/healthz"))
    assert response.status_code == 200


async def read_all(stream: trio.SocketStream, texts: list[str]) -> None:
    async with stream:
        texts.append(b"".join([part async for part in stream]).decode())


async def test_stopping_lets_answers_end(twin: Twin) -> None:
    stop, texts = trio.Event(), list[str]()
    twin.pause_s = 0.02
    with trio.fail_after(15):  # less than the grace: it does not wait without a reason
        async with trio.open_nursery() as nursery:
            app = create_app(twin, ApiSettings())
            url = await nursery.start(partial(serve_http, app, "127.0.0.1", 0, stop=stop, grace_s=20))
            nursery.start_soon(read_all, await send_request(url, stream=True), texts)
            async with await send_request(url) as idle:
                assert await idle.receive_some()
                stop.set()
                assert all([part async for part in idle])  # to its end
    assert texts[0].count("[DONE]") == 1


async def test_stopping_cuts_long_answers_with_a_word(twin: Twin) -> None:
    stop, texts = trio.Event(), list[str]()
    twin.stall_after = 3
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            app = create_app(twin, ApiSettings())
            url = await nursery.start(partial(serve_http, app, "127.0.0.1", 0, stop=stop, grace_s=0.2))
            nursery.start_soon(read_all, await send_request(url, stream=True), texts)
            nursery.start_soon(read_all, await send_request(url), texts)
            while twin.entered < 2 or not twin.stalled.is_set():
                await trio.sleep(0.01)
            await trio.sleep(0.2)  # the stream's first bytes leave
            stop.set()
    assert all("shutting_down" in text and "[DONE]" not in text for text in texts)
    assert sorted(text[:12] for text in texts) == ["HTTP/1.1 200", "HTTP/1.1 503"]
    assert twin.left == 2


async def test_cancelling_ends_at_once(twin: Twin) -> None:
    twin.stall_after = 3
    with trio.fail_after(PROMPTLY):
        async with trio.open_nursery() as nursery:
            url = await nursery.start(partial(serve_http, create_app(twin, ApiSettings()), "127.0.0.1", 0))
            connection = await send_request(url, stream=True)
            await twin.stalled.wait()
            nursery.cancel_scope.cancel()
    await connection.aclose()
    assert twin.left == 1
