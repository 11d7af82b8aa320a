"""/azu/account/1: a worker asks what it is owed, and gets it signed. Nobody is told of another's account."""

from __future__ import annotations

import time

import trio

from azu.channel import IDLE_S, Channel
from azu.errors import ProtocolError
from azu.identity import Identity
from azu.ledger import Connection, Ledger, PayoutState, reading
from azu.ledger.accounts import held, paying, worker
from azu.overlay import OverlayStream
from azu.statements import AccountStatement, sign_statement
from azu.wire.messages import ACCOUNT, GetStatus, Status

__all__ = ["Owed"]

_PAID: tuple[PayoutState, ...] = ("confirmed",)
_MAX_PAYOUTS = 100_000  # of one worker: three a day for a century


class Owed:
    """Answers workers out of the ledger."""

    def __init__(self, identity: Identity, ledger: Ledger) -> None:
        self._identity = identity
        self._ledger = ledger
        self._turn = trio.Lock()  # whoever asks without end keeps one thread of the ledger's busy, and no more

    async def handle(self, stream: OverlayStream) -> None:
        """Serve an /azu/account/1 stream."""
        channel = Channel(stream, ACCOUNT)
        while (received := await channel.receive(IDLE_S)) is not None:
            if not isinstance(received[0], GetStatus):
                raise ProtocolError(f"{type(received[0]).__name__} is not a request", code="unexpected_message")
            await channel.send(Status(), sign_statement(self._identity, await self.statement(stream.peer_id)))

    async def statement(self, peer_id: str) -> AccountStatement:
        """A worker's account as of now; raises InternalError where the ledger cannot be read."""

        def read(connection: Connection) -> dict[str, str]:
            accounts = {"owed": worker(peer_id), "held": held(peer_id), "paying": paying(peer_id)}
            sums = {name: reading.balance(connection, account) for name, account in accounts.items()}
            done = reading.payouts(connection, _PAID, peer_id=peer_id, limit=_MAX_PAYOUTS)
            return {name: str(amount) for name, amount in {**sums, "paid": sum(each.amount for each in done)}.items()}

        async with self._turn:
            amounts = await self._ledger.read(read)
        return AccountStatement(
            coordinator=self._identity.peer_id,
            worker=peer_id,
            currency=self._ledger.currency,
            issued_at=int(time.time()),
            **amounts,
        )
