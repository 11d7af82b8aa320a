"""A coordinator's HTTP side in a process of its own, to be killed: it says where it listens, and when it stalls."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from tests.coordinator.api.paying import ALICE, PRICE, open_bank
from tests.coordinator.api.twin import Twin, served_model

MONEY = 10**18


async def main(folder: Path, template: Path) -> None:
    """Serve until killed; the first answer stops after five tokens."""
    twin = Twin([served_model(folder / "model")], price=PRICE, stall_after=5)
    async with open_bank(twin, folder, template, mode="open") as bank:
        await bank.pay_in(MONEY, ALICE)
        print(bank.url, flush=True)
        await twin.stalled.wait()
        print("stalled", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
