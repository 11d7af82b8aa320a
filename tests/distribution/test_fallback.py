"""Files that no peer has, from a hub that does not send them."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from huggingface_hub import constants

from azu.distribution import FetchProgress, fetch_blobs, hub_fallback
from azu.errors import NetworkError
from azu.models.publish import publish
from azu.models.store import LayerStore
from tests.distribution.nodes import LIMIT, SMALL, SOON, Nodes, manifest_of
from tests.loopback_hub import LoopbackHub, sharded_llama


async def test_a_hub_that_sends_too_slowly_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.distribution.fallback._GRACE_S", 0.3)
    manifest = manifest_of(SMALL, origin="me/tiny")
    with socket.create_server(("127.0.0.1", 0)) as silent, trio.fail_after(LIMIT):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{revision}/{filename}")
        fallback = hub_fallback(manifest, LayerStore(tmp_path), FetchProgress())
        assert fallback is not None
        with pytest.raises(NetworkError, match="too slowly"):
            await fallback(manifest.config)


def test_a_model_from_elsewhere_has_no_fallback(tmp_path: Path) -> None:
    assert hub_fallback(manifest_of(SMALL), LayerStore(tmp_path), FetchProgress()) is None


async def test_a_large_layer_that_no_peer_has_comes_from_the_hub(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its piece list too, which nobody can send."""
    me, first, _ = nodes
    files = sharded_llama(n_layers=2, hidden=512)
    shown: list[str] = []
    monkeypatch.setattr("azu.distribution.fetching.show_status", shown.append)
    monkeypatch.setattr("azu.distribution.fetching._SHOW_S", 0.01)
    with LoopbackHub() as hub, trio.fail_after(LIMIT):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        commit = hub.add("me/tiny", files)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        manifest = replace(
            publish(str(tmp_path), first.library.store), model_id="me/tiny", origin="me/tiny", revision=commit
        )
        wanted = manifest.layers
        assert all(layer.piece_list for layer in wanted)
        progress = FetchProgress()
        fallback = hub_fallback(manifest, me.library.store, progress)
        offenders = me.library.offenders
        await fetch_blobs(
            me.overlay, me.library.store, wanted, peers=[], offenders=offenders, fallback=fallback, progress=progress,
            patience=SOON,
        )  # fmt: skip
    assert all(me.library.store.check(blob.digest) for blob in wanted)
    assert (progress.percent, progress.coming, list(progress.sources)) == (100, 0, ["the hub"])
    assert progress.done == progress.total
    assert any(text.startswith("fetching layers: ") and "/s from the hub" in text for text in shown)
    assert shown[-1] == ""


def test_progress_in_words() -> None:
    progress = FetchProgress(done=1 << 20, total=4 << 20)
    assert progress.text(1 << 19, 1) == "fetching layers: 25%, 1.0 MiB of 4.0 MiB, 512.0 KiB/s from 1 peer, 6 s left"
    progress.coming = 1 << 20
    assert progress.text(0, 0) == "fetching layers: 50%, 2.0 MiB of 4.0 MiB, 0 B/s from the hub"
