"""Lines of any length on loopback: TCP forwarders that hand on what they get some time later."""

from __future__ import annotations

import queue
import threading

import trio

__all__ = ["Forwarders"]

CHUNK = 1 << 18


class Forwarders:
    """Ports of loopback that lead to other ports of it, `delay` seconds away each way; set it at any time."""

    def __init__(self) -> None:
        self.delay = 0.0
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=trio.run, args=(self._run,), daemon=True).start()

    def to(self, port: int) -> int:
        """Another port that leads to this one."""
        self._wanted.put(port)
        return self._made.get()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                port = await trio.to_thread.run_sync(self._wanted.get, abandon_on_cancel=True)
                [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(self._serve, listener, port)
                self._made.put(listener.socket.getsockname()[1])

    async def _serve(self, listener: trio.SocketListener, port: int) -> None:
        async def forward(near: trio.SocketStream) -> None:
            try:
                far = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                await near.aclose()
                return
            async with near, far, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, near, far)
                nursery.start_soon(self._pump, far, near)

        await trio.serve_listeners(forward, [listener])

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        put, get = trio.open_memory_channel[tuple[float, bytes]](1000)

        async def write() -> None:
            async for due, data in get:
                await trio.sleep_until(due)
                await target.send_all(data)
            await target.send_eof()

        try:
            async with trio.open_nursery() as nursery, put:
                nursery.start_soon(write)
                while data := await source.receive_some(CHUNK):
                    await put.send((trio.current_time() + self.delay, data))
                put.close()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.aclose_forcefully(target)
