"""`azu-coordinator payouts list`, `run` and `retry`, beside a running coordinator or without one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import asdict

import click
import trio
from rich.console import Console
from rich.table import Table

from azu.errors import InputError, NetworkError
from azu.ledger import Database, Ledger, Payout, Refusal, reading
from azu.payments import HYPE, SOL, UNITS, Coin, open_provider
from azu.payments.keys import no_key
from azu.payments.payouts import Payouts
from coordinator.ledger_settings import ledger_place
from coordinator.payout_settings import PayoutSettings, RetrySettings

__all__ = ["list_payouts", "retry_payout", "run_payouts"]

_POLL_S = 1.0
_LOST_S = 10.0  # that another transaction took a nonce has to be seen twice, with the confirmations between
_PATIENCE_S = 120.0  # without any payout ending; HyperEVM makes a block in 1 s, Solana finalises one in 13 s


def list_payouts(settings: PayoutSettings) -> None:
    """Print what workers are owed, and the payouts, newest first."""
    with closing(Database(ledger_place(settings))) as database:
        database.check()
        with database.reading() as connection:
            owed = reading.balances(connection, "worker")
            payouts = reading.payouts(connection)
            currency = reading.head(connection).currency
    coin = _coin(currency)
    if settings.as_json:
        document = {"currency": currency, "owed": owed, "payouts": [asdict(payout) for payout in payouts]}
        click.echo(json.dumps(document, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    _show_owed(console, owed, coin, settings)
    if not payouts:
        click.echo("no payouts yet")
        return
    table = Table("PAYOUT", "WORKER", "ADDRESS", "AMOUNT", "STATE", "TRANSACTION", box=None, pad_edge=False)
    for payout in payouts:
        state = f"{payout.state}: {payout.reason}" if payout.reason else payout.state
        table.add_row(
            payout.payout_id, payout.peer_id, payout.address, coin.format(payout.amount), state, payout.txid or "-"
        )
    for column in table.columns:
        column.overflow = "fold"  # in a narrow terminal too, all of a transaction's id
    console.print(table)


async def run_payouts(settings: PayoutSettings) -> None:
    """Take every payout that is planned or under way to its end."""
    async with _opened(settings) as (payouts, _):
        await _finish(payouts, settings, await payouts.open())


async def retry_payout(settings: RetrySettings) -> None:
    """Take one payout up again: a failed one is planned anew, one under way is sent and looked at."""
    async with _opened(settings) as (payouts, ledger):
        payout = next((each for each in await ledger.payouts() if each.payout_id == settings.payout_id), None)
        if payout is None:
            remedy = "azu-coordinator payouts list shows them"
            raise InputError(f"there is no payout {settings.payout_id}", code="no_such_payout", remedy=remedy)
        if payout.state == "confirmed":
            raise InputError(f"payout {payout.payout_id} was paid: transaction {payout.txid}", code="already_paid")
        if payout.state == "failed":
            await _finish(payouts, settings, [await _planned_again(payouts, ledger, payout)])
        elif settings.lost:
            click.echo(_line(await _given_up(payouts, payout), payouts.coin))
        else:
            await _finish(payouts, settings, [payout])


async def _given_up(payouts: Payouts, payout: Payout) -> Payout:
    deadline = trio.current_time() + _LOST_S
    while isinstance(given_up := await payouts.give_up(payout.payout_id), Refusal):
        if trio.current_time() > deadline:
            raise InputError(given_up.message, code=given_up.code, remedy=given_up.remedy)
        await trio.sleep(_POLL_S)
    return given_up or payout


async def _planned_again(payouts: Payouts, ledger: Ledger, payout: Payout) -> Payout:
    amount = min(payout.amount, await ledger.balance(f"worker:{payout.peer_id}"))
    again = await payouts.plan_one(payout.peer_id, payout.address, amount) if amount else None
    if again is None:
        raise InputError(
            f"{payout.peer_id} is owed nothing any more: it was paid by another payout",
            code="already_paid",
            remedy="azu-coordinator payouts list shows which",
        )
    return again


async def _finish(payouts: Payouts, settings: PayoutSettings, wanted: list[Payout]) -> None:
    """Rounds until these payouts are over, or nothing has happened for a while."""
    waiting = {payout.payout_id for payout in wanted}
    deadline = trio.current_time() + _PATIENCE_S
    over: list[Payout] = []
    problem = ""
    while waiting and trio.current_time() < deadline:
        progress = await payouts.advance()
        for payout in progress.ended:
            deadline = trio.current_time() + _PATIENCE_S
            over.append(payout)
            if not settings.as_json:
                click.echo(_line(payout, payouts.coin))
        under_way = await payouts.open()
        waiting &= {payout.payout_id for payout in under_way}
        problem = progress.problem
        if problem and all(payout.state == "planned" for payout in under_way):
            break
        if waiting:
            await trio.sleep(_POLL_S)
    if settings.as_json:
        click.echo(json.dumps({"payouts": [asdict(payout) for payout in over], "left": len(waiting)}, indent=2))
    elif not over and not waiting:
        click.echo("nothing to pay")
    if waiting:
        raise NetworkError(
            f"{len(waiting)} payouts are not over yet" + (f": {problem}" if problem else ""),
            code="payouts_left",
            remedy="Nothing is lost: mend what it says, and run azu-coordinator payouts run again",
        )


@asynccontextmanager
async def _opened(settings: PayoutSettings) -> AsyncIterator[tuple[Payouts, Ledger]]:
    place = ledger_place(settings)
    with closing(Database(place)) as database:  # a mistyped folder shall not become a new ledger
        await trio.to_thread.run_sync(database.check)
    async with open_provider(settings) as provider:
        if not provider.address:
            raise InputError("PAYMENT_PROVIDER is none: nobody is paid", code="no_payments")
        if settings.scheduler_private_key is None:
            raise no_key()
        async with Ledger.open(place, currency=provider.coin.unit) as ledger:
            yield Payouts(ledger, provider, threshold=provider.coin.parse(settings.payout_threshold)), ledger


def _show_owed(console: Console, owed: dict[str, int], coin: Coin, settings: PayoutSettings) -> None:
    if not owed:
        click.echo("no worker is owed anything that is not under way")
        return
    threshold = coin.parse(settings.payout_threshold) if coin is not UNITS else 0
    table = Table("WORKER", "IS OWED", "", box=None, pad_edge=False)
    for peer, amount in sorted(owed.items(), key=lambda item: -item[1]):
        note = "below the threshold" if amount < threshold else "is paid once it is seen with an address"
        table.add_row(peer, coin.format(amount), note)
    console.print(table)


def _coin(currency: str) -> Coin:
    return next((coin for coin in (HYPE, SOL) if coin.unit == currency), UNITS)


def _line(payout: Payout, coin: Coin) -> str:
    if payout.state == "confirmed":
        return f"paid {coin.format(payout.amount)} to {payout.address}, transaction {payout.txid}"
    amount = coin.format(payout.amount)
    return f"payout {payout.payout_id} of {amount} to {payout.address}: {payout.state}, {payout.reason}"
