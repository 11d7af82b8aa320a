"""GET and POST /v1/pricing: what a token-layer costs, and what a request can cost at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from azu.payments.base import PaymentProvider
from coordinator.api.amounts import amount_out
from coordinator.api.till import Quote, Till, deposit_object
from coordinator.generation import GenerationRequest, ServedModel

__all__ = ["currency_object", "preview_object", "pricing_object"]


def pricing_object(till: Till, provider: PaymentProvider, models: Sequence[ServedModel]) -> dict[str, Any]:
    """The prices, by token-layer and by token of each model."""
    return {
        "object": "pricing",
        "currency": currency_object(provider),
        "price_per_token_layer": amount_out(till.price),
        "models": [
            {
                "id": model.model_id,
                "layers": model.manifest.n_layers,
                "price_per_token": amount_out(till.price * model.manifest.n_layers),
            }
            for model in models
        ],
        "deposit": deposit_object(provider) if provider.address else None,
    }


def preview_object(till: Till, provider: PaymentProvider, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """The most that a chat completion request can cost; it is put aside while the request runs."""
    quote: Quote = till.quote(requests)
    return {
        "object": "pricing.preview",
        "model": requests[0].model.model_id,
        "prompt_tokens": len(requests[0].prompt),
        "max_tokens": requests[0].max_tokens,
        "n": len(requests),
        "token_layers": quote.token_layers,
        "cost": amount_out(quote.cost),
        "currency": currency_object(provider),
    }


def currency_object(provider: PaymentProvider) -> dict[str, Any]:
    """What amounts are counted in: 10^decimals units are one coin."""
    return {"symbol": provider.coin.symbol, "unit": provider.coin.unit, "decimals": provider.coin.decimals}
