"""Real stages of a tiny random model, each behind an overlay of its own on loopback, and a coordinator to play."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import trio
import trio.lowlevel

from azu.channel import Channel
from azu.identity import Identity
from azu.models.manifest import Manifest
from azu.models.publish import publish
from azu.models.splice import StageSpec, stage_tensor_names
from azu.models.store import LayerStore
from azu.overlay import Overlay, OverlayConfig, OverlayStream, open_overlay
from azu.records import VALIDATORS
from azu.tickets import JobTicket, Receipt, open_receipt, sign_ticket
from azu.wire.messages import (
    JOB,
    JOB_PROTOCOL,
    PACK,
    PACK_PROTOCOL,
    RING_PROTOCOL,
    End,
    Failed,
    Message,
    Nexts,
    Open,
    Ping,
    Prompt,
    Ready,
    ReceiptReply,
    Token,
)
from azu.wire.tensors import WeightFormat
from azu.wire.tokens import pack_tokens
from node.engine.device import DeviceThread, open_device_thread
from node.engine.hardware import find_device
from node.engine.stage import LoadedStage, load_stage
from node.jobs import Jobs, Loaded

LIMIT = 60.0  # seconds; only keeps a hung test from hanging the run
KV_TOKENS = 8192
N_LAYERS = 4
VOCAB = 64
CUTS = {1: (0, 4), 2: (0, 2, 4), 3: (0, 1, 3, 4)}


@dataclass
class TinyModel:
    """A published model of four layers, and the unsplit original."""

    manifest: Manifest
    store: LayerStore
    unsplit: Any
    dtype: WeightFormat = "float32"

    def stage(self, start: int, end: int) -> LoadedStage:
        config = json.loads(self.store.path(self.manifest.config.digest).read_bytes())
        spec = StageSpec(config=config, start=start, end=end, n_layers=N_LAYERS)
        blobs = self.manifest.blobs_for(start, end, stage_tensor_names(spec)[1])
        files = {name: self.store.path(blob.digest) for name, blob in blobs.items()}
        return load_stage(spec, self.dtype, find_device("cpu", 2**30, 1), files, vocab_size=VOCAB)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """What the unsplit model answers."""
        output = self.unsplit.generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return [int(token) for token in output[0, len(prompt) :]]


def tiny_model(folder: Path) -> TinyModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.5,  # so that answers vary
    )  # fmt: skip
    auto: Any = transformers.AutoModelForCausalLM
    unsplit = auto.from_config(config, dtype=torch.float32).eval()
    unsplit.save_pretrained(folder / "source")
    store = LayerStore(folder / "store")
    return TinyModel(publish(str(folder / "source"), store), store, unsplit)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@dataclass
class Stage:
    """A worker's jobs, and what they run on."""

    identity: Identity
    overlay: Overlay
    jobs: Jobs
    device: DeviceThread
    start: int
    end: int

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def assert_idle(self) -> None:
        assert self.jobs.count == 0
        assert self.jobs.kv.room == KV_TOKENS

    async def until_idle(self, seconds: float = 10.0) -> None:
        with trio.fail_after(seconds):
            while self.jobs.count:
                await trio.sleep(0.005)
        self.assert_idle()


@dataclass
class JobEnd:
    """What the coordinator got of a job."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    receipts: dict[int, Receipt] = field(default_factory=dict)
    failures: list[Failed] = field(default_factory=list)


@dataclass
class Coordinator:
    """The other end of the job streams, played by the test."""

    identity: Identity
    overlay: Overlay
    stages: Sequence[Stage]
    manifest: str
    frames: int = 0  # of tokens that came in packs
    running: dict[bytes, tuple[JobEnd, int, trio.Event]] = field(default_factory=dict)

    def ticket(self, prompt_tokens: int, max_tokens: int = 8, **changes: Any) -> JobTicket:
        now = int(time.time())
        fields: dict[str, Any] = {
            "job_id": os.urandom(16),
            "epoch": 0,
            "manifest": self.manifest,
            "n_layers": N_LAYERS,
            "stages": [{"peer_id": s.peer_id, "start": s.start, "end": s.end} for s in self.stages],
            "dtype": "float32",
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "stop_tokens": (),
            "sampling": {},
            "price": 2,
            "begun_at": now,
            "issued_at": now,
            "expires_at": now + 600,
            "coordinator": self.identity.peer_id,
        }
        return JobTicket.model_validate(fields | changes)

    @asynccontextmanager
    async def opened(self, ticket: JobTicket, index: int = 0) -> AsyncIterator[Channel]:
        """A job stream to one stage, the ticket handed over."""
        async with await self.overlay.open_stream(self.stages[index].peer_id, JOB_PROTOCOL) as stream:
            channel = Channel(stream, JOB)
            await channel.send(Open(), sign_ticket(self.identity, ticket))
            yield channel

    async def answer(self, ticket: JobTicket, prompt: Sequence[int]) -> JobEnd:
        """Run a job to its end, or to its first failure, and collect the receipts."""
        end = JobEnd()
        done = trio.Event()
        self.running[ticket.job_id] = end, ticket.max_tokens, done

        async def attend(index: int) -> None:
            async with self.opened(ticket, index) as channel:
                if index in (0, len(self.stages) - 1):
                    await channel.send(Prompt(), pack_tokens(prompt))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(speak, channel)
                    await self._listen(channel, index, end, done)
                    nursery.cancel_scope.cancel()

        async def speak(channel: Channel) -> None:
            while not done.is_set():
                with trio.move_on_after(0.5):
                    await done.wait()
                if not done.is_set():
                    await channel.send(Ping())
            await channel.send(End(tokens=len(end.tokens)))

        async with trio.open_nursery() as nursery:
            for index in range(len(self.stages)):
                nursery.start_soon(attend, index)
        return end

    async def take_packs(self, stream: OverlayStream) -> None:
        """Handles /azu/pack/1 where a test wants it: tokens of any of the jobs."""
        channel = Channel(stream, PACK, max_body=0)
        while (received := await channel.receive()) is not None:
            message, _ = received
            assert isinstance(message, Nexts)
            self.frames += 1
            for job_id, epoch, index, token in message.jobs:
                end, most, done = self.running[job_id]
                while index > len(end.tokens):  # the job's own stream brings what was sent before this one was open
                    await trio.lowlevel.checkpoint()
                assert (epoch, index) == (0, len(end.tokens))
                end.tokens.append(token)
                if len(end.tokens) == most:
                    end.finish = "length"
                    done.set()

    async def _listen(self, channel: Channel, index: int, end: JobEnd, done: trio.Event) -> None:
        while (received := await channel.receive()) is not None:
            message, body = received
            if isinstance(message, Token):
                assert message.index == len(end.tokens)
                end.tokens.append(message.token)
                end.finish = message.finish
            elif isinstance(message, Failed) and not done.is_set():  # later, a neighbour has ended before this one
                end.failures.append(message)
            elif isinstance(message, ReceiptReply):
                end.receipts[index] = open_receipt(bytes(body))[1]
                return
            if end.finish or end.failures:
                done.set()


async def next_of(channel: Channel, kind: type[Message]) -> Any:
    """The next message of that kind; signs of life and of readiness are passed over."""
    while (received := await channel.receive()) is not None:
        if isinstance(received[0], kind):
            return received[0]
        assert isinstance(received[0], Ping | Ready), received[0]
    return None


def identity(number: int) -> Identity:
    return Identity(bytes([number]) * 32)


# The coordinators that every worker serves.
TRUSTED = frozenset(identity(number).peer_id for number in (98, 99))


@asynccontextmanager
async def peer(number: int) -> AsyncIterator[Overlay]:
    config = OverlayConfig(identity(number).seed, ("/ip4/127.0.0.1/tcp/0",), validators=VALIDATORS)
    async with open_overlay(config) as overlay:
        yield overlay


@asynccontextmanager
async def real_stage(
    model: TinyModel, number: int, start: int, end: int, *, takes_packs: bool = True
) -> AsyncIterator[Stage]:
    async with peer(number) as overlay, open_device_thread() as thread:
        jobs = Jobs(identity(number), overlay, thread, is_trusted=TRUSTED.__contains__)
        jobs.loaded = Loaded(model.manifest.digest, start, end, model.stage(start, end), KV_TOKENS, 1, 1, 2 * KV_TOKENS)
        overlay.handle(JOB_PROTOCOL, jobs.handle_job)
        overlay.handle(RING_PROTOCOL, jobs.handle_ring)
        if takes_packs:
            overlay.handle(PACK_PROTOCOL, jobs.handle_pack)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jobs.packs.run)
            yield Stage(identity(number), overlay, jobs, thread, start, end)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def real_ring(model: TinyModel, count: int, *, refusing: int = -1) -> AsyncIterator[Coordinator]:
    """A coordinator connected to `count` real stages that are connected to each other. One may take no packs."""
    with trio.fail_after(LIMIT):
        async with AsyncExitStack() as stack:
            ranges = enumerate(pairwise(CUTS[count]), 1)
            stages = [
                await stack.enter_async_context(real_stage(model, n, *range_, takes_packs=n != refusing + 1))
                for n, range_ in ranges
            ]
            me = await stack.enter_async_context(peer(99))
            for stage in stages:
                await me.connect(stage.peer_id, stage.overlay.addrs)
                for other in stages:
                    if other is not stage:
                        await other.overlay.connect(stage.peer_id, stage.overlay.addrs)
            yield Coordinator(identity(99), me, stages, model.manifest.digest)
