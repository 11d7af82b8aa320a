"""A private swarm: whoever has not got the key stays outside, and learns nothing."""

from __future__ import annotations

import dataclasses
import logging
import os
from itertools import pairwise

import pytest
import trio
from nacl.bindings import crypto_secretbox

from azu.errors import InputError, NetworkError
from azu.overlay import OverlayConfig, open_overlay
from azu.overlay.swarm_key import NONCE_BYTES, hsalsa20, xsalsa20
from tests.overlay.conftest import LIMIT, config, echo, receive_exactly

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
GREETING = b"\x13/multistream/1.0.0\n"


def keyed(number: int, key: bytes | None, *, server: bool = True) -> OverlayConfig:
    return dataclasses.replace(config(number, server=server), swarm_key=key)


def test_hsalsa20_is_that_of_the_paper() -> None:
    """D. J. Bernstein, "Cryptography in NaCl" (2009), section 8."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    second = bytes.fromhex("dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4")
    assert hsalsa20(shared, bytes(16)) == first
    assert hsalsa20(first, bytes.fromhex("69696ee955b62b73cd62bda875fc73d6")) == second


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 100_000])
def test_xsalsa20_is_libsodiums(size: int) -> None:
    key, nonce, message = os.urandom(32), os.urandom(NONCE_BYTES), os.urandom(size)
    boxed = crypto_secretbox(message, nonce, key)[16:]  # which spends 32 bytes of the stream on its tag's key
    cuts = sorted({0, size, size // 3, size // 2})
    cipher = xsalsa20(key, nonce)
    cipher.encrypt(bytes(32))
    assert b"".join(cipher.encrypt(message[a:b]) for a, b in pairwise(cuts)) == boxed


async def test_members_talk_as_usual() -> None:
    with trio.fail_after(LIMIT):
        async with open_overlay(keyed(1, KEY)) as server, open_overlay(keyed(2, KEY, server=False)) as client:
            server.handle("/test/echo", echo)
            await client.bootstrap(server.addrs[:1])
            sent = os.urandom(3_000_000)
            async with await client.open_stream(server.peer_id, "/test/echo") as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, sent)
                assert await receive_exactly(stream, len(sent)) == sent


@pytest.mark.parametrize(("theirs", "ours"), [(KEY, OTHER), (KEY, None), (None, KEY)])
async def test_strangers_stay_outside_and_both_ends_know_why(
    theirs: bytes | None, ours: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(LIMIT), caplog.at_level(logging.DEBUG, "azu"):
        async with open_overlay(keyed(1, theirs)) as server, open_overlay(keyed(2, ours)) as client:
            started = trio.current_time()
            with pytest.raises(NetworkError, match="swarm") as caught:
                await client.connect(server.peer_id, server.addrs[:1])
            assert trio.current_time() - started < 5  # the first bytes tell; nobody waits for a timeout
            assert ("--swarm-key" if ours is None else "swarm key") in caught.value.message
            while not any("swarm" in told(each) for each in caplog.records):  # the server's side
                await trio.sleep(0.02)
            assert not server.connected_peers()
            assert not client.connected_peers()


def told(record: logging.LogRecord) -> str:
    return record.getMessage()


async def test_a_stranger_gets_nothing_but_random_bytes() -> None:
    async def answer(server: str, sent: bytes) -> bytes:
        async with await trio.open_tcp_stream("127.0.0.1", int(server.split("/")[4])) as stream:
            await stream.send_all(sent)
            got = b""
            while True:
                try:
                    part = await stream.receive_some()
                except trio.BrokenResourceError:
                    return got
                if not part:
                    return got
                got += part

    with trio.fail_after(LIMIT):
        async with open_overlay(keyed(1, KEY)) as server:
            for sent in (GREETING, os.urandom(100), b"GET / HTTP/1.1\r\n\r\n" + bytes(100)):
                got = [await answer(server.addrs[0], sent) for _ in range(2)]
                assert all(b"libp2p" not in each and b"multistream" not in each for each in got)
                assert all(len(each) <= NONCE_BYTES + len(GREETING) for each in got)
                assert got[0][:NONCE_BYTES] != got[1][:NONCE_BYTES]  # nor anything to recognise it by


async def test_on_the_wire_is_what_the_specification_says() -> None:
    """A member written down from the specification, byte by byte, without a line of ours but the cipher."""
    with trio.fail_after(LIMIT):
        async with open_overlay(keyed(1, KEY)) as server:
            port = int(server.addrs[0].split("/")[4])
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                nonce = os.urandom(NONCE_BYTES)
                noise = b"\x07/noise\n"
                for byte in nonce + xsalsa20(KEY, nonce).encrypt(GREETING + noise):
                    await stream.send_all(bytes([byte]))  # the server must not need them in one piece
                got = b""
                while len(got) < NONCE_BYTES + len(GREETING + noise):
                    got += await stream.receive_some()
            assert xsalsa20(KEY, got[:NONCE_BYTES]).encrypt(got[NONCE_BYTES:]) == GREETING + noise


async def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="32 bytes"):
        async with open_overlay(keyed(1, KEY[:31])):
            pass


def test_the_key_is_not_shown() -> None:
    assert KEY.hex() not in repr(keyed(1, KEY))
    assert str(KEY) not in repr(keyed(1, KEY))
