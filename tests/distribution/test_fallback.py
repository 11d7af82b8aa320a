"""Files that no peer has, from a hub that does not send them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from huggingface_hub import constants

from azu.distribution import hub_fallback
from azu.errors import NetworkError
from azu.models.store import LayerStore
from tests.distribution.nodes import LIMIT, SMALL, manifest_of


async def test_a_hub_that_sends_too_slowly_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azu.distribution.fallback._GRACE_S", 0.3)
    manifest = manifest_of(SMALL, origin="me/tiny")
    with socket.create_server(("127.0.0.1", 0)) as silent, trio.fail_after(LIMIT):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{revision}/{filename}")
        fallback = hub_fallback(manifest, LayerStore(tmp_path))
        assert fallback is not None
        with pytest.raises(NetworkError, match="too slowly"):
            await fallback(manifest.config)


def test_a_model_from_elsewhere_has_no_fallback(tmp_path: Path) -> None:
    assert hub_fallback(manifest_of(SMALL), LayerStore(tmp_path)) is None
