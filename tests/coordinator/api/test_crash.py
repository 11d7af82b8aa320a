"""A coordinator that is killed in the middle of an answer: its client gets everything back, once."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import httpx

from azu.accounts.store import key_limits
from azu.ledger import Ledger
from tests.coordinator.api.crashing import MONEY
from tests.coordinator.api.paying import ALICE
from tests.coordinator.api.twin import MODEL_ID

ROOT = Path(__file__).parents[3]
BODY = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}


def killed_in_an_answer(folder: Path, template: Path) -> None:
    command = [sys.executable, "-m", "tests.coordinator.api.crashing", str(folder), str(template)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            ask = threading.Thread(target=_ask, args=(url,))
            ask.start()
            assert process.stdout.readline() == "stalled\n"
        finally:
            process.kill()
    ask.join(30)


def _ask(url: str) -> None:
    headers = {"Authorization": f"Bearer {ALICE.address}"}
    try:
        httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers, timeout=60)
    except httpx.TransportError:
        return  # killed


async def test_what_was_put_aside_comes_back(tmp_path: Path, empty_ledger: Path) -> None:
    killed_in_an_answer(tmp_path, empty_ledger)
    place = tmp_path / "ledger.sqlite3"
    async with Ledger.open(place, currency="wei", owner="test", key_limits=key_limits) as ledger:
        client, reserved = f"client:{ALICE.address}", f"reserved:{ALICE.address}"
        aside = await ledger.balance(reserved)
        assert aside > 0
        assert await ledger.balance(client) == MONEY - aside
        assert len(await ledger.release_abandoned()) == 1
        assert (await ledger.balance(client), await ledger.balance(reserved)) == (MONEY, 0)
        assert await ledger.release_abandoned() == []
        assert await ledger.verify() == []
