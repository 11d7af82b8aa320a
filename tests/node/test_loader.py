"""From an assignment to a loaded stage: what a worker's memory allows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import trio

from azu.distribution import Library
from azu.errors import CapacityError, ModelError
from azu.identity import Identity
from azu.models.memory import KEPT_KERNELS, kv_room, stage_memory
from azu.models.prepacked import PrepackedLinear
from azu.overlay import OverlayConfig, open_overlay
from azu.tickets import Assignment
from node.engine import hardware
from node.engine.device import open_device_thread
from node.engine.hardware import Device
from node.jobs import Loaded
from node.loader import Loader
from node.supply import Supply
from node.trust import Trust
from tests.node.real_stages import LIMIT, TinyModel, tiny_model

ME = Identity.generate()
TOKENS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("loader"))


def needs(model: TinyModel, *, packed: bool = False) -> int:
    return stage_memory(model.manifest, 1, 3, "float32", TOKENS, packed=packed).total


def library_of(model: TinyModel, folder: Path) -> Library:
    """A worker's, with all of the model's files."""
    folder.mkdir(exist_ok=True)
    (folder / "layers").symlink_to(model.store.root)
    library = Library(folder)
    library.publish(ME, model.manifest)
    return library


async def loaded(model: TinyModel, folder: Path, vram: int, *, end: int = 3) -> Loaded:
    """Layers 1..end by a worker that offers so much memory."""
    library = library_of(model, folder)
    assignment = Assignment(
        worker=ME.peer_id, coordinator=ME.peer_id, manifest=model.manifest.digest, start=1, end=end, dtype="float32",
        kv_tokens=TOKENS, sequence=1, expires_at=int(time.time()) + 60,
    )  # fmt: skip
    config = OverlayConfig(ME.seed, ("/ip4/127.0.0.1/tcp/0",))
    with trio.fail_after(LIMIT):
        async with open_overlay(config) as overlay, open_device_thread() as thread:
            supply = Supply(overlay, library, Trust((ME.peer_id,)), use_hub=False)
            return await Loader(supply, thread, Device("cpu", "", vram, "float32")).load(assignment)


def packed_layers(loaded: Loaded) -> int:
    model: Any = loaded.stage._stage.model  # type: ignore[attr-defined]
    return sum(isinstance(module, PrepackedLinear) for module in model.modules())


@pytest.mark.parametrize("pays", [True, False])
async def test_layers_are_packed_where_that_pays(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    monkeypatch.setattr(hardware, "layers_pay", lambda: pays)
    vram = needs(model, packed=True) + (1 << 20)
    found = await loaded(model, tmp_path, vram)
    assert packed_layers(found) == (14 if pays else 0)
    assert found.kv_tokens == kv_room(model.manifest, 1, 3, "float32", vram, packed=pays) >= TOKENS


async def test_kernels_come_after_the_kv_cache_that_is_asked_for(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "layers_pay", lambda: True)
    vram = needs(model, packed=True) - 1
    found = await loaded(model, tmp_path, vram)
    assert packed_layers(found) == 0
    assert found.kv_tokens == kv_room(model.manifest, 1, 3, "float32", vram)
    assert needs(model, packed=True) > needs(model) + KEPT_KERNELS


async def test_what_does_not_fit_or_does_not_exist(model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="are offered"):
        await loaded(model, tmp_path / "small", needs(model) - 1)
    with pytest.raises(ModelError, match="has 4 layers"):
        await loaded(model, tmp_path / "far", 1 << 30, end=5)
