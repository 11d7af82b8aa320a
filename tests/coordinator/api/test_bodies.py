from __future__ import annotations

import json
from functools import partial

import httpx
import trio

from coordinator.api import ApiSettings, create_app, serve_http
from tests.coordinator.api.conftest import in_thread
from tests.coordinator.api.twin import MODEL_ID, Twin

LIMIT = 30.0  # seconds; only keeps a hung test from hanging the run
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
QUESTION = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hello"}]}


async def connect(url: str) -> trio.SocketStream:
    host, port = url.removeprefix("http://").split(":")
    return await trio.open_tcp_stream(host, int(port))


async def ask(url: str, padding: int = 0) -> httpx.Response:
    body = json.dumps(QUESTION).encode() + b" " * padding
    headers = {"Content-Type": "application/json"}
    return await in_thread(lambda: httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers))


async def test_all_bodies_together_are_bounded(nursery: trio.Nursery, twin: Twin) -> None:
    settings = ApiSettings(max_body_bytes=100_000, max_bodies_bytes=150_000)
    url = await nursery.start(partial(serve_http, create_app(twin, settings), "127.0.0.1", 0))
    with trio.fail_after(LIMIT):
        slow = [await connect(url) for _ in range(2)]
        for connection in slow:
            await connection.send_all(HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 70_000)
        refused = await ask(url, 50_000)
        while refused.status_code == 200:  # what the slow ones sent had not all arrived
            refused = await ask(url, 50_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        assert refused.headers["Retry-After"] == "2"
        assert (await ask(url)).status_code == 200
        for connection in slow:
            await connection.aclose()
        while (await ask(url, 50_000)).status_code != 200:
            await trio.sleep(0.01)


async def test_a_slow_body_is_cut(nursery: trio.Nursery, twin: Twin) -> None:
    settings = ApiSettings(body_timeout_s=0.2)
    url = await nursery.start(partial(serve_http, create_app(twin, settings), "127.0.0.1", 0))
    with trio.fail_after(LIMIT):
        async with await connect(url) as connection:
            await connection.send_all(HEAD + b"Content-Length: 1000\r\n\r\n{")
            answer = bytes(await connection.receive_some())
    assert answer.startswith(b"HTTP/1.1 408")


async def test_headers_without_end_are_refused(url: str) -> None:
    with trio.fail_after(LIMIT):
        async with await connect(url) as connection:
            received = b""
            try:
                await connection.send_all(HEAD)
                for number in range(10_000):  # 10 MB
                    await connection.send_all(f"X-{number}: {'x' * 1_000}\r\n".encode())
            except trio.BrokenResourceError:
                pass
            else:
                received = bytes(await connection.receive_some())
            assert received[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert json.loads((await ask(url)).text)["choices"]
