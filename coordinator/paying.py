"""Workers' payouts in a running coordinator: planned by their records, and paid where the private key is here."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from azu.errors import AzuError
from azu.ledger import Ledger
from azu.logs import log
from azu.payments import PaymentProvider
from azu.payments.payouts import Payouts
from azu.payments.settings import PaymentSettings
from azu.records import WorkerRecord

__all__ = ["keep_paying"]

logger = logging.getLogger(__name__)

_PLAN_EVERY_S = 10.0
_LOOK_EVERY_S = 2.0  # at payouts under way
_PAUSE_S = 30.0  # after an error: the platform lacks coin, the chain's RPCs or the database are away


class Swarm(Protocol):
    """Of `coordinator.swarm.SwarmView`, what is needed here."""

    def workers(self) -> Sequence[WorkerRecord]:
        """Live workers' records, as they signed them."""


async def keep_paying(settings: PaymentSettings, ledger: Ledger, provider: PaymentProvider, swarm: Swarm) -> None:
    """Plan and pay until cancelled; at once nothing where there is no money."""
    if not provider.address:
        return
    payouts = Payouts(ledger, provider, threshold=provider.coin.parse(settings.payout_threshold))

    async def plan() -> float:
        await payouts.plan({record.peer_id: record.payout_address for record in swarm.workers()})
        return _PLAN_EVERY_S

    async def pay() -> float:
        progress = await payouts.advance()
        if progress.left:
            return _PAUSE_S if progress.problem else _LOOK_EVERY_S
        return settings.payout_every

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_repeat, plan)
        if settings.scheduler_private_key is not None:
            nursery.start_soon(_repeat, pay)


async def _repeat(step: Callable[[], Awaitable[float]]) -> None:
    """A border: whatever fails now may work later, and jobs go on meanwhile."""
    while True:
        try:
            pause = await step()
        except AzuError as error:
            log(logger, logging.WARNING, "payouts are held up", reason=error.message, remedy=error.remedy)
            pause = _PAUSE_S
        await trio.sleep(pause)
