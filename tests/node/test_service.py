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

BOOTSTRAP = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"


def test_a_missing_package_is_told_before_anything_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "azu.models.integer_weights", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    settings = NodeSettings(data_dir=tmp_path, bootstrap=(BOOTSTRAP,), dtype="int8", device="cpu")
    with pytest.raises(InputError) as raised:
        trio.run(serve, settings, trio.Event())
    assert raised.value.code == "missing_package"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "is_told"), [(2**20, True), (2**30, False), (None, False)])
def test_a_cache_that_is_smaller_than_the_memory_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int | None, is_told: bool
) -> None:
    leave = trio.Event()
    leave.set()
    settings = NodeSettings(
        data_dir=tmp_path,
        bootstrap=(BOOTSTRAP,),
        listen=("/ip4/127.0.0.1/tcp/0",),
        device="cpu",
        vram=2**29,
        cache_limit=limit,
        port_mapping=False,
        leave_patience=0,
    )
    trio.run(serve, settings, leave)
    told = [record for record in caplog.records if "will not fit the cache" in record.message]
    assert bool(told) == is_told
    assert all("--cache-limit" in str(record.__dict__) for record in told)
