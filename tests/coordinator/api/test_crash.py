"""A coordinator that is killed in the middle of an answer: its client gets everything back, once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from azu.accounts.store import key_limits
from azu.ledger import Ledger
from azu.ledger.reading import kept_jobs
from tests.coordinator.api.crashing import MONEY
from tests.coordinator.api.paying import ALICE, PRICE, cost, open_bank
from tests.coordinator.api.twin import MODEL_ID, Twin

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


async def test_it_is_paid_as_far_as_it_came(tmp_path: Path, empty_ledger: Path, twin: Twin) -> None:
    """Its stages know what they sampled; what was put aside beyond that comes back."""
    killed_in_an_answer(tmp_path, empty_ledger)
    twin.price = PRICE
    async with open_bank(twin, tmp_path, empty_ledger, mode="open", is_new=False) as bank:
        aside = (await bank.has())[1]
        (job_id,) = await bank.ledger.read(kept_jobs)
        twin.known[bytes.fromhex(job_id)] = 5
        assert aside > 0
        await bank.until_none_is_kept()
        prompt = len(twin.requests[0].prompt)
        assert await bank.has() == (MONEY - cost(prompt + 5 - 1), 0)
        assert await bank.ledger.verify() == []


async def test_what_was_put_aside_for_nothing_comes_back(tmp_path: Path, empty_ledger: Path) -> None:
    shutil.copyfile(empty_ledger, tmp_path / "ledger.sqlite3")
    async with Ledger.open(tmp_path / "ledger.sqlite3", currency="wei", owner="test", key_limits=key_limits) as ledger:
        await ledger.deposit("hyperliquid", "eip155:999", "0x1", ALICE.address, MONEY)
        await ledger.reserve("0" * 32, ALICE.address, 5, expires_at=1)
        assert len(await ledger.release_abandoned()) == 1
        assert await ledger.balance(f"client:{ALICE.address}") == MONEY
        assert await ledger.release_abandoned() == []
        assert await ledger.verify() == []
