"""Noise messages cut anywhere by the network, and bytes that wait to be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from noise.backends.default.ciphers import ChaCha20Cipher
from noise.state import CipherState

from azu.overlay._link import KEPT_BYTES, Inbox, NoiseLink


class Wire:
    """A raw connection: what is written piles up, and is read in the given portions."""

    def __init__(self) -> None:
        self.bytes = b""
        self.portions: list[int] = []

    async def write(self, data: bytes) -> None:
        self.bytes += data

    async def read(self, n: int) -> bytes:
        size = min(n, self.portions.pop(0) if self.portions else n)
        data, self.bytes = self.bytes[:size], self.bytes[size:]
        return data


def make_link(wire: Wire) -> NoiseLink:
    """A link that talks to itself: both directions have the same key."""
    states = []
    for _ in range(2):
        protocol: Any = SimpleNamespace(cipher_class=ChaCha20Cipher)
        state = CipherState(protocol)
        state.cipher.initialize(bytes(32))
        state.k, state.n = bytes(32), 0
        states.append(state)
    protocol = SimpleNamespace(cipher_state_encrypt=states[0], cipher_state_decrypt=states[1])
    noise = SimpleNamespace(
        noise_state=SimpleNamespace(noise_protocol=protocol), read_writer=SimpleNamespace(read_write_closer=wire)
    )
    return NoiseLink(SimpleNamespace(conn=noise, _drain=lambda n: b""))


@given(
    plaintexts=st.lists(st.binary(max_size=90), max_size=6),
    portions=st.lists(st.integers(1, 60), max_size=40),
)
def test_messages_may_be_cut_anywhere(plaintexts: list[bytes], portions: list[int]) -> None:
    async def main() -> None:
        wire = Wire()
        link = make_link(wire)
        await link.send(plaintexts)
        wire.portions = portions
        got: list[bytes] = []
        while wire.bytes:
            got += await link.receive()
        assert got == plaintexts
        with pytest.raises(ConnectionClosedError):
            await link.receive()

    trio.run(main)


async def test_the_longest_message_comes_whole() -> None:
    wire = Wire()
    link = make_link(wire)
    longest = bytes(65_519)
    await link.send([longest, b"x"])
    wire.portions = [1, 30_000]
    assert [await link.receive() for _ in range(3)] == [[], [], [longest, b"x"]]


@pytest.mark.parametrize("at", [5, 40])
async def test_a_changed_byte_ends_it(at: int) -> None:
    wire = Wire()
    link = make_link(wire)
    await link.send([b"hello", b"world"])
    wire.bytes = wire.bytes[:at] + bytes([wire.bytes[at] ^ 1]) + wire.bytes[at + 1 :]
    with pytest.raises(InvalidTag):
        await link.receive()


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from([0, 1, 3, KEPT_BYTES - 1, KEPT_BYTES, KEPT_BYTES + 7])),
            st.tuples(st.just("take"), st.integers(1, 2 * KEPT_BYTES)),
        ),
        max_size=30,
    )
)
def test_an_inbox_gives_back_what_came(steps: list[tuple[str, int]]) -> None:
    inbox, model, taken = Inbox(), b"", []
    for number, (step, size) in enumerate(steps):
        if step == "add":
            data = bytes([number]) * size
            inbox.add(memoryview(data))
            model += data
        elif model:
            part = inbox.take(size)
            taken.append((part, model[:size]))
            model = model[size:]
        assert len(inbox) == len(model)
    for part, expected in taken:  # what was taken stays as it was, whatever came after
        assert b"".join(part) == expected
    if model:
        assert b"".join(inbox.take(len(model))) == model


def test_tiny_frames_cost_little_more_than_their_bytes() -> None:
    inbox = Inbox()
    message = memoryview(bytes(65_519))
    for at in range(10_000):
        inbox.add(message[at : at + 1])
    assert len(inbox) == 10_000
    assert len(inbox.take(10_000)) == 1
