"""What a request may cost is put aside before it waits for its turn; what it did not cost is given back.

The swarm side captures at settlement what was delivered (`coordinator.meter`), and with it releases the rest. What was
put aside for a job that never came so far is released here; after a crash the next start does that.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import trio

from azu.economics import highest_token_layers
from azu.ledger import Ledger, Refusal, Reserved, Shortfall
from azu.payments.base import PaymentProvider
from coordinator.api.amounts import amount_out
from coordinator.api.auth import unauthorized
from coordinator.api.errors import ApiError
from coordinator.api.kept import Kept
from coordinator.generation import GenerationRequest

__all__ = ["Quote", "Till", "deposit_object"]

# No ticket lives longer. What a coordinator that crashed had put aside is given back at its restart, or long after.
_RESERVED_S = 86_400


@dataclass(frozen=True, slots=True)
class Quote:
    """The most that a request can come to; `cost` in the chain's smallest unit."""

    token_layers: int
    cost: int


class Till:
    """Takes the money of requests; one for the app.

    Args:
        price: smallest units per token-layer.
        unsettled: ids of ended jobs that are settled later; what is put aside for these stays so.
    """

    def __init__(self, ledger: Ledger, provider: PaymentProvider, price: int, unsettled: Container[str] = ()) -> None:
        self._ledger = ledger
        self._unsettled = unsettled
        self._provider = provider
        self.price = price

    def quote(self, requests: Sequence[GenerationRequest]) -> Quote:
        """What these jobs cost together, if every answer becomes as long as it may."""
        most = sum(
            highest_token_layers(len(each.prompt), each.max_tokens, each.model.manifest.n_layers) for each in requests
        )
        return Quote(most, most * self.price)

    @asynccontextmanager
    async def reserved(self, requests: Sequence[GenerationRequest], kept: Kept | None = None) -> AsyncIterator[None]:
        """Have the highest cost of all these jobs put aside, or that of none. The block settles them, or fails.

        Where no money can be paid in, nothing is. A request that is taken up has its cost put aside already, and one
        that is let go keeps it.

        Raises:
            ApiError: status 402 where the balance or the key's limit does not reach, 401 where the key is gone.
        """
        jobs = [
            each
            for number, each in enumerate(requests)
            if each.wallet and self._provider.address and (kept is None or kept.standings[number].ended is None)
        ]
        try:
            for number, each in enumerate(jobs):
                answer = await self._reserve(each)
                if isinstance(answer, Refusal):
                    raise self._refused(answer, jobs[:number], requests)
                if answer.state != "open":
                    raise _closed(each)
            yield
        except BaseException as error:  # also where the client left: what was delivered is settled by now
            is_ended = isinstance(error, trio.Cancelled)  # the process, where nothing else cancels it
            with trio.CancelScope(shield=True):
                if kept is None or not (
                    kept.is_let_go or (is_ended and kept.outlives(is_stopped=False)) or not await kept.leads()
                ):
                    await self.release([each.job_id for each in jobs])
            raise

    async def release(self, job_ids: Iterable[bytes]) -> None:
        """Give back what is put aside for these jobs, but for those that are settled, or will be."""
        for job_id in job_ids:
            if job_id.hex() not in self._unsettled:
                await self._ledger.release(job_id.hex())

    async def _reserve(self, request: GenerationRequest) -> Reserved | Refusal:
        amount = self.quote([request]).cost
        # A cancelled call may have reserved all the same: its release is the caller's, who knows the job's id.
        return await self._ledger.reserve(
            request.job_id.hex(),
            request.wallet,
            amount,
            key_id=request.key_id,
            expires_at=int(time.time()) + _RESERVED_S,
        )

    def _refused(
        self, refusal: Refusal, before: Sequence[GenerationRequest], requests: Sequence[GenerationRequest]
    ) -> ApiError:
        if not isinstance(refusal, Shortfall):
            return unauthorized(refusal.message, refusal.code, refusal.remedy)
        coin, needed = self._provider.coin, self.quote(requests).cost
        available = refusal.available + self.quote(before).cost
        details: dict[str, Any] = {
            "required": amount_out(needed),
            "available": amount_out(available),
            "missing": amount_out(needed - available),
            "unit": coin.unit,
        }
        asks = f"This request may cost {coin.format(needed)}, and "
        if refusal.code == "key_limit":
            message = f"{asks}its API key may spend {coin.format(available)} more"
            remedy = "Send a smaller max_tokens, or use a key with a higher limit."
        else:
            message = f"{asks}the balance is {coin.format(available)}"
            remedy = (
                f"Send a smaller max_tokens, or pay in {coin.format(needed - available)} or more: send it from the "
                f"wallet to {self._provider.address} on {self._provider.chain}, and the transaction's id to "
                "POST /deposit."
            )
            details["deposit"] = deposit_object(self._provider)
        return ApiError(message, status=HTTPStatus.PAYMENT_REQUIRED, code=refusal.code, remedy=remedy, details=details)


def _closed(request: GenerationRequest) -> ApiError:
    return ApiError(
        f"The job {request.job_id.hex()} is settled already",
        status=HTTPStatus.CONFLICT,
        code="job_settled",
        remedy="Send the request again.",
    )


def deposit_object(provider: PaymentProvider) -> dict[str, Any]:
    """Where money is to be sent."""
    return {
        "provider": provider.name,
        "chain": provider.chain,
        "address": provider.address,
        "claim": "POST /deposit with tx_sig and user_pubkey",
    }
