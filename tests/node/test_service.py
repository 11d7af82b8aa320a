"""What `azu-node join` checks before it joins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from azu.config import NodeSettings
from azu.errors import InputError
from azu.identity import Identity
from node.service import serve


def test_a_missing_package_is_told_before_anything_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "azu.models.integer_weights", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    bootstrap = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    settings = NodeSettings(data_dir=tmp_path, bootstrap=(bootstrap,), dtype="int8", device="cpu")
    with pytest.raises(InputError) as raised:
        trio.run(serve, settings, trio.Event())
    assert raised.value.code == "missing_package"
    assert not list(tmp_path.iterdir())
