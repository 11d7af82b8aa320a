"""`azu-node status` where there is no worker to ask, or one that does not answer; tests/swarm has one that does."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import trio

from azu.errors import NetworkError
from azu.metrics import serve_metrics
from node import status as status_module
from node.status import ADDRESS_FILE, fetch_status
from tests.node.real_stages import peer


def code_of(data_dir: Path) -> str:
    with pytest.raises(NetworkError) as caught:
        fetch_status(data_dir)
    assert str(data_dir) in caught.value.message
    assert caught.value.remedy
    return caught.value.code


def point_to(port: int, data_dir: Path, peer_id: str = "somebody") -> None:
    (data_dir / ADDRESS_FILE).write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "peer_id": peer_id}))


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"url": 7, "peer_id": "a"}', '{"url": "x:y", "peer_id": ""}']
)
def test_a_folder_that_no_worker_runs_on(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / ADDRESS_FILE).write_text(content)
    assert code_of(tmp_path) == "not_running"


def test_a_worker_that_died_without_tidying_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_to(server.getsockname()[1], tmp_path)
    assert code_of(tmp_path) == "not_running"


def test_a_worker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_PATIENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_to(server.getsockname()[1], tmp_path)
        assert code_of(tmp_path) == "no_answer"


async def test_another_program_has_its_port_now(tmp_path: Path) -> None:
    class Other:
        def metrics(self) -> tuple[()]:
            return ()

        def status(self) -> dict[str, str]:
            return {"peer_id": "another"}

    with trio.fail_after(60):
        async with peer(1) as overlay, trio.open_nursery() as nursery:
            for reporter in (None, Other()):  # one without /status, and another worker
                url = await nursery.start(serve_metrics, overlay, ("127.0.0.1", 0), "azu-test/1", reporter)
                point_to(int(url.rsplit(":", 1)[1]), tmp_path)
                assert await trio.to_thread.run_sync(code_of, tmp_path) == "not_running"
            nursery.cancel_scope.cancel()
