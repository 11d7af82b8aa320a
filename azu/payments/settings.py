"""How a coordinator takes and pays money. The older design's variables, without AZU_, are read too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings

from azu.setting_types import Text, Words, cli

__all__ = ["PaymentSettings"]


def _names(name: str) -> Any:
    """The variable, and its name in the older design."""
    return AliasChoices(f"AZU_{name.upper()}", name)


class PaymentSettings(BaseSettings):
    """Which chain, where it is reached, and whose money it is."""

    payment_provider: Literal["hyperliquid", "solana", "none"] = Field(
        default="hyperliquid",
        validation_alias=_names("payment_provider"),
        description="What clients pay with: HYPE on HyperEVM, SOL on Solana, or nothing, where the swarm is private.",
    )
    hyperliquid_rpc_url: Words = Field(
        default=(),
        validation_alias=_names("hyperliquid_rpc_url"),
        description="An RPC of HyperEVM, such as https://rpc.hyperliquid.xyz/evm. May be given several times: the next "
        "one steps in for one that fails.",
        json_schema_extra=cli(metavar="URL"),
    )
    hyperliquid_address: Text | None = Field(
        default=None,
        validation_alias=_names("hyperliquid_address"),
        description="The platform's address on HyperEVM, which deposits are sent to. That of the private key where "
        "omitted.",
        json_schema_extra=cli(metavar="ADDRESS"),
    )
    hyperliquid_chain_id: int = Field(
        default=999,
        ge=1,
        lt=2**63,
        validation_alias=_names("hyperliquid_chain_id"),
        description="The chain's id: 999 is HyperEVM, 998 its test network.",
        json_schema_extra=cli(metavar="NUMBER"),
    )
    hyperliquid_confirmations: int = Field(
        default=2,
        ge=1,
        le=10_000,
        validation_alias=_names("hyperliquid_confirmations"),
        description="Blocks after which a transaction counts as final, its own included.",
        json_schema_extra=cli(metavar="BLOCKS"),
    )
    solana_rpc_url: Words = Field(
        default=(),
        validation_alias=_names("solana_rpc_url"),
        description="An RPC of Solana, such as https://api.mainnet-beta.solana.com. May be given several times.",
        json_schema_extra=cli(metavar="URL"),
    )
    solana_address: Text | None = Field(
        default=None,
        validation_alias=_names("solana_address"),
        description="The platform's address on Solana. That of the private key where omitted.",
        json_schema_extra=cli(metavar="ADDRESS"),
    )
    solana_cluster: Text = Field(
        default="mainnet-beta",
        validation_alias=_names("solana_cluster"),
        description="mainnet-beta, testnet or devnet, or the genesis hash of another cluster.",
        json_schema_extra=cli(metavar="CLUSTER"),
    )
    scheduler_private_key: SecretStr | None = Field(
        default=None,
        validation_alias=_names("scheduler_private_key"),
        description="The platform's private key, which only payouts need: hex, a JSON array of bytes, or a file.",
        json_schema_extra=cli(option=""),
    )
    payout_threshold: Text = Field(
        default="0.001",
        validation_alias=_names("payout_threshold"),
        description="What a worker must have earned before it is paid, in coins.",
        json_schema_extra=cli(metavar="AMOUNT"),
    )
    payout_every: int = Field(
        default=600,
        ge=1,
        le=31_536_000,
        validation_alias=_names("payout_every"),
        description="Seconds between the rounds in which a coordinator that has the private key pays its workers.",
        json_schema_extra=cli(metavar="SECONDS"),
    )
    min_deposit: Text = Field(
        default="0.0001",
        validation_alias=_names("min_deposit"),
        description="The smallest deposit that is taken, in coins.",
        json_schema_extra=cli(metavar="AMOUNT"),
    )
