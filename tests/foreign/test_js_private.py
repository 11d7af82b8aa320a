"""A private swarm that js-libp2p has the key of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio

from azu.errors import NetworkError
from azu.overlay import open_overlay
from azu.swarm_key import read_swarm_key, write_new_swarm_key
from tests.foreign.conftest import OpenJs, node_config, worker_record
from tests.foreign.js_peer import JsError
from tests.overlay.conftest import LIMIT, echo

MIB = 1 << 20


async def test_only_with_its_key_js_is_let_in(open_js: OpenJs, tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    write_new_swarm_key(key)
    private = dataclasses.replace(node_config(1), swarm_key=read_swarm_key(key))
    with trio.fail_after(LIMIT):
        async with (
            open_overlay(private) as node,
            open_js(server=True, swarmKey=key.read_text()) as member,
            open_js() as stranger,
        ):
            node.handle("/test/echo", echo)
            await member.call("dial", addr=node.addrs[0])
            got = await member.call("echo", peer=node.peer_id, size=MIB)
            assert got["received"] == got["sent"]
            assert got["count"] == MIB
            await node.disconnect(member.peer_id)
            await node.bootstrap(member.addrs)
            assert await node.ping(member.peer_id) > 0
            record, value = worker_record(1)
            await node.put_record(record, value)
            assert await member.call("get", key=record) == value.hex()

            with pytest.raises(JsError):
                await stranger.call("dial", addr=node.addrs[0])
            with pytest.raises(NetworkError):
                await node.connect(stranger.peer_id, stranger.addrs)
