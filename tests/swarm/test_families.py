"""Families other than the demo's, in stages, through real worker processes: token for token the unsplit model's.

This process is the coordinator: it publishes, assigns layers to three workers, and gives them a job. The workers stay
for all families, so each also has to let go of one model and take another.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import trio

from azu.channel import Channel
from azu.distribution import LayerServer, Library
from azu.identity import Identity
from azu.models.manifest import Manifest
from azu.models.publish import publish
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import VALIDATORS, WorkerRecord, open_worker_record
from azu.tickets import Assignment, sign_assignment
from azu.wire.messages import CONTROL, CONTROL_PROTOCOL, LAYERS_PROTOCOL, Accepted, Assign, GetStatus, Status
from tests.local_swarm import LOOPBACK, PATIENCE_S, Program
from tests.models.conftest import TINY
from tests.models.families import FAMILIES
from tests.node.real_stages import Coordinator, prompt_of

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

# Between them every kind of cache: full, sliding window, latent attention, linear attention; three have experts.
NAMES = ["GPT-2", "Gemma 2", "Qwen2-MoE", "DeepSeek-V2", "Qwen3-Next", "Falcon, new"]
IN_PARTS = ["Gemma 2", "Qwen3-Next"]
# A coordinator for each: a worker may still be closing its connections to the one before.
COORDINATORS = {
    name: Identity(bytes([100 + number]) * 32)
    for number, name in enumerate([*NAMES, *(f"{name} in parts" for name in IN_PARTS)])
}
TOKENS = 24


class Worker(NamedTuple):
    """A worker process, and the layers that it is to hold."""

    peer_id: str
    start: int = 0
    end: int = 0


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, list[str]]]]:
    """(peer id, addresses) of three running workers, which know each other through a bootstrap node."""
    folder = tmp_path_factory.mktemp("families")
    programs: list[Program] = []

    def start(name: str, *command: str) -> Program:
        program = Program(name, [*command, "--listen", LOOPBACK, "--data-dir", str(folder / name)])
        stack.callback(program.stop)
        programs.append(program)
        return program

    with ExitStack() as stack:
        stack.callback(lambda: print(*(program.describe() for program in programs), sep="\n"))
        bootstrap = start("bootstrap", "azu-bootstrap", "run").wait_for("bootstrap node ready")["addrs"][0]
        options = ("--vram", "1GiB", "--device", "cpu", "--threads", "1")
        trusted = [word for me in COORDINATORS.values() for word in ("--trust", me.peer_id)]
        workers = [start(f"worker{n}", "azu-node", "join", bootstrap, *options, *trusted) for n in range(3)]
        started = [worker.wait_for("worker starting") for worker in workers]
        yield [(fields["peer"], fields["addrs"]) for fields in started]


@pytest.mark.parametrize("name", NAMES)
async def test_through_three_processes(name: str, addresses: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    identity = COORDINATORS[name]
    unsplit = random_model(name, tmp_path / "source")
    library = Library(tmp_path)
    manifest = publish(str(tmp_path / "source"), library.store)
    library.publish(identity, manifest)
    layers = manifest.n_layers
    cut = (0, 1, layers - 1, layers)
    with trio.fail_after(PATIENCE_S):
        async with coordinator(identity, library, addresses) as overlay:
            workers = [Worker(peer, *part) for (peer, _), part in zip(addresses, pairwise(cut), strict=True)]
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(load, identity, overlay, worker, manifest)
            me = Coordinator(identity, overlay, workers, manifest.digest)  # type: ignore[arg-type]  # it needs no more of them
            for length in (11, 40):
                prompt = prompt_of(length, seed=length)
                end = await me.answer(me.ticket(length, TOKENS, n_layers=layers), prompt)
                assert not end.failures
                assert end.tokens == greedy(unsplit, prompt), name
                assert {receipt.tokens for receipt in end.receipts.values()} == {length + TOKENS - 1}


@pytest.mark.parametrize("name", IN_PARTS)
async def test_parts_of_what_is_loaded(name: str, addresses: list[tuple[str, list[str]]], tmp_path: Path) -> None:
    """Jobs of three chains at once, for which each process runs another part of its layers."""
    identity = COORDINATORS[f"{name} in parts"]
    unsplit = random_model(name, tmp_path / "source")
    library = Library(tmp_path)
    manifest = publish(str(tmp_path / "source"), library.store)
    library.publish(identity, manifest)
    one, two, three = (peer_id for peer_id, _ in addresses)
    chains = [
        [Worker(one, 0, 3), Worker(two, 3, 4)],
        [Worker(three, 0, 1), Worker(one, 1, 2), Worker(two, 2, 4)],
        [Worker(three, 0, 4)],
    ]
    answers: dict[int, list[int]] = {}
    with trio.fail_after(PATIENCE_S):
        async with coordinator(identity, library, addresses) as overlay:
            async with trio.open_nursery() as nursery:
                for worker in (Worker(one, 0, 3), Worker(two, 1, 4), Worker(three, 0, 4)):
                    nursery.start_soon(load, identity, overlay, worker, manifest)

            async def ask(number: int) -> None:
                me = Coordinator(identity, overlay, chains[number % 3], manifest.digest)  # type: ignore[arg-type]  # as above
                prompt = prompt_of(11, seed=number)
                end = await me.answer(me.ticket(11, TOKENS, n_layers=4), prompt)
                assert not end.failures
                answers[number] = end.tokens

            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(ask, number)
    assert answers == {number: greedy(unsplit, prompt_of(11, seed=number)) for number in range(6)}


def random_model(name: str, folder: Path) -> Any:
    """A small random model of a family, saved as the hub would have it."""
    family = next(family for family in FAMILIES if family.name == name)
    torch.manual_seed(0)
    settings = {**TINY, "initializer_range": 0.3, "max_position_embeddings": 128, "eos_token_id": None}
    config = getattr(transformers, family.config)(**settings | family.settings)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What the unsplit model answers, token by token."""
    cache = transformers.DynamicCache(config=model.config)
    ids, tokens = torch.tensor([prompt]), []
    for _ in range(TOKENS):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@asynccontextmanager
async def coordinator(
    identity: Identity, library: Library, addresses: list[tuple[str, list[str]]]
) -> AsyncIterator[Overlay]:
    """This process as a peer that serves the library's layers, connected to the workers."""
    async with open_overlay(OverlayConfig(identity.seed, (LOOPBACK,), validators=VALIDATORS)) as overlay:
        overlay.handle(LAYERS_PROTOCOL, LayerServer(library).handle)
        for peer_id, addrs in addresses:
            await overlay.connect(peer_id, addrs)
        yield overlay


async def load(identity: Identity, overlay: Overlay, worker: Worker, manifest: Manifest) -> None:
    """Assign the layers, and wait until the worker has them ready."""
    now = time.time()
    assignment = Assignment(
        worker=worker.peer_id, coordinator=identity.peer_id,
        manifest=manifest.digest, start=worker.start, end=worker.end, dtype="float32", kv_tokens=256,
        sequence=int(now * 1000), expires_at=int(now) + 600,
    )  # fmt: skip
    async with await overlay.open_stream(worker.peer_id, CONTROL_PROTOCOL) as stream:
        channel = Channel(stream, CONTROL)
        await channel.send(Assign(), sign_assignment(identity, assignment))
        await channel.expect(Accepted)
        while (record := await status(channel)).range_in("loading", manifest.digest):
            await trio.sleep(0.1)
        assert record.range_in("loaded", manifest.digest) == (worker.start, worker.end), "see the worker's log above"


async def status(channel: Channel) -> WorkerRecord:
    """The worker's newest record."""
    await channel.send(GetStatus())
    _, record = await channel.expect(Status)
    return open_worker_record(bytes(record))
