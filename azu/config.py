"""The settings of every program, as one tree.

    BaseAzuSettings              logging and --debug
    ├── SwarmSettings            what opens a swarm
    │   ├── ListeningSettings    what others are told
    │   │   ├── MemberSettings   where to join and to listen
    │   │   │   ├── NodeSettings azu-node join, with WorkerSettings
    │   │   │   └── CoordinatorSettings  azu-coordinator, with LedgerPlace,
    │   │   │                    PaymentSettings (azu.payments.settings), AccountSettings (azu.accounts.settings)
    │   │   └── BootstrapSettings  azu-bootstrap
    │   └── DhtSettings          azu-dht
    ├── WorkerSettings           what a worker has and offers
    │   └── PlanSettings         azu-node plan (node.settings)
    ├── StatusSettings           azu-node status, leave and earnings (node.settings)
    ├── LedgerPlace              where the money is written down
    ├── CatalogueSettings        azu-coordinator models, prune
    │   ├── ShardSettings        azu-coordinator shard
    │   └── RemoveSettings       azu-coordinator remove
    └── DemoSettings             azu-demo (azu.demo.settings)

A value comes from, in this order: the command line, an AZU_* environment variable, a .env file in the working folder,
the default. `azu.cli.settings_options` makes the command line from these fields, so each description is help text.
A list in a variable is separated by commas or spaces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from azu.accounts.settings import AccountSettings
from azu.payments.settings import PaymentSettings
from azu.setting_types import (
    Device,
    Folder,
    HostPort,
    Multiaddrs,
    PayoutAddress,
    PeerAddresses,
    PeerIds,
    Port,
    Size,
    SwarmKeyFile,
    Text,
    Words,
    cli,
)
from azu.sizes import format_size, parse_size
from azu.wire.tensors import WeightFormat

__all__ = [
    "ENV_PREFIX",
    "KV_TOKENS",
    "MAX_TOKENS",
    "NODE_DIR",
    "BaseAzuSettings",
    "BootstrapSettings",
    "CatalogueSettings",
    "CoordinatorSettings",
    "DhtSettings",
    "LedgerPlace",
    "NodeSettings",
    "RemoveSettings",
    "ShardSettings",
    "WorkerSettings",
    "format_size",
    "parse_size",
]

ENV_PREFIX = "AZU_"
_COORDINATOR_DIR = Path("~/.azu/coordinator")
NODE_DIR = Path("~/.azu/node")
KV_TOKENS = 8192  # what every worker keeps room for, unless the coordinator's operator says otherwise
MAX_TOKENS = 1_000_000  # tokens; far above any context length, below what could overflow an estimate


class BaseAzuSettings(BaseSettings):
    """What every program has."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",  # a .env file may hold other programs' variables
        frozen=True,
        validate_default=True,
        hide_input_in_errors=True,
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="How much to log to stderr; debug also shows what the libraries underneath say."
    )
    log_json: bool = Field(default=False, description="Log one JSON object a line, for a log collector.")
    debug: bool = Field(default=False, description="Show the stack trace when something fails.")


class SwarmSettings(BaseAzuSettings):
    """What opens a swarm."""

    swarm_key: SwarmKeyFile | None = Field(
        default=None,
        description="The key file of a private swarm, as `azu-bootstrap new-swarm-key` makes it. Every member needs "
        "it, and nobody else can connect.",
        json_schema_extra=cli(metavar="FILE"),
    )


class ListeningSettings(SwarmSettings):
    """What every member of a swarm has."""

    announce: Multiaddrs = Field(
        default=(),
        description="An address to tell others instead of those of this machine's interfaces, where a router's "
        "forwarded port or a name leads here, such as /ip4/203.0.113.7/tcp/4001. May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    port_mapping: bool = Field(
        default=True,
        description="Where nobody can connect, ask the router to lead a port of its own here (NAT-PMP, UPnP).",
    )


class MemberSettings(ListeningSettings):
    """What every member of a swarm has that is not a bootstrap node."""

    bootstrap: PeerAddresses = Field(
        default=(),
        description="A peer of the swarm to join through, as `azu-bootstrap run` prints it. "
        "May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    listen: Multiaddrs = Field(
        default=("/ip4/0.0.0.0/tcp/0",),
        description="An address to accept peers on; port 0 lets the system choose one. May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    upload_limit: Size | None = Field(
        default=None,
        description="Bytes of layer files to send per second, all peers together, such as 10MiB. No limit where "
        "omitted.",
        json_schema_extra=cli(metavar="SIZE"),
    )
    uploads: int = Field(
        default=16,
        ge=1,
        le=256,
        description="Peers to send layer files to at once; others are told to come again.",
        json_schema_extra=cli(metavar="NUMBER"),
    )


class WorkerSettings(BaseAzuSettings):
    """What a worker has and offers, whether it joins or only plans."""

    device: Device = Field(
        default="auto",
        description="Where to compute: auto takes the first CUDA GPU and else the CPU; or cpu, cuda:N.",
        json_schema_extra=cli(metavar="DEVICE"),
    )
    vram: Size | None = Field(
        default=None,
        description="Memory to offer for layers and their caches, such as 8GiB. Measured on the device where omitted.",
        json_schema_extra=cli(metavar="SIZE"),
    )
    dtype: Literal["auto", WeightFormat] = Field(
        default="auto",
        description="Format of the weights in memory; auto is bfloat16 on a GPU and float32 on a CPU. int8 and int4 "
        "take a quarter and a sixth of float32's memory, compute in bfloat16, and need torchao.",
    )
    data_dir: Folder = Field(
        default=NODE_DIR,
        description="Holds the identity key (keep it: it is your peer id and earns your money) and the layers fetched. "
        "Every program that runs at once needs its own.",
        json_schema_extra=cli(metavar="FOLDER"),
    )


class NodeSettings(WorkerSettings, MemberSettings):
    """A worker: where it joins, what it offers, where it keeps things."""

    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads to compute with. One for each CPU that the process may use where omitted.",
    )
    cache_limit: Size | None = Field(
        default=None,
        description="Disk space that layer files may take, such as 50GiB; those not used for longest are deleted. As "
        "much as the disk has where omitted.",
        json_schema_extra=cli(metavar="SIZE"),
    )
    failover_memory: Size = Field(
        default=512 << 20,
        description="Main memory that may hold what was sent on for running jobs, such as 2GiB, so that a worker which "
        "takes the next stage over can be sent it again. Beyond that, this one computes it again.",
        json_schema_extra=cli(metavar="SIZE"),
    )
    receipts_limit: Size = Field(
        default=256 << 20,
        description="Disk space for the tickets and receipts of jobs that were served, such as 1GiB; the oldest are "
        "deleted. What they earned is kept as sums.",
        json_schema_extra=cli(metavar="SIZE"),
    )
    receipts_days: int = Field(
        default=400,
        ge=1,
        le=36_500,
        description="Days to keep tickets and receipts for.",
        json_schema_extra=cli(metavar="DAYS"),
    )
    no_hub: bool = Field(
        default=False,
        description="Never fetch from the model hub: without it, files that no peer has come from the repository that "
        "the model was published from.",
    )
    payout_address: PayoutAddress | None = Field(
        default=None,
        description="The wallet that earnings are paid to. Earnings are only counted where omitted.",
        json_schema_extra=cli(metavar="ADDRESS"),
    )
    metrics: HostPort = Field(
        default="127.0.0.1:0",
        description="Where to serve /healthz, /status and Prometheus' /metrics; port 0 lets the system choose one, "
        "which `azu-node status` finds. Keep it on loopback: it has no accounts.",
        json_schema_extra=cli(metavar="HOST:PORT"),
    )
    leave_patience: int = Field(
        default=60,
        ge=0,
        le=3_600,
        description="Seconds that the worker stays for when it is stopped, until others have taken its jobs over.",
        json_schema_extra=cli(metavar="SECONDS"),
    )
    relay: bool = Field(
        default=False,
        description="Relay for workers that cannot be connected to, within limits, where this one can be.",
    )
    trust: PeerIds = Field(
        default=(),
        description="Take work from this coordinator only. May be given several times. Where omitted, the worker keeps "
        "to the first coordinator that assigns it layers, until it is restarted.",
        json_schema_extra=cli(metavar="PEER_ID"),
    )


class LedgerPlace(BaseAzuSettings):
    """Where the money is written down."""

    ledger_url: Text | None = Field(
        default=None,
        description="The ledger's database, such as postgresql://azu@db.example.org/azu (with its password in "
        "~/.pgpass or PGPASSWORD). The file ledger.sqlite3 in the data folder where omitted.",
        json_schema_extra=cli(metavar="URL"),
    )


class CoordinatorSettings(PaymentSettings, AccountSettings, MemberSettings, LedgerPlace):
    """A coordinator: which swarm, which models, where its HTTP endpoint listens."""

    models: Words = Field(
        default=(),
        description="A model to serve besides those that were sharded: a folder of safetensors, a .gguf file, or a hub "
        "id such as Qwen/Qwen3-0.6B. May be given several times.",
        json_schema_extra=cli(metavar="PATH_OR_HUB_ID", option="--model"),
    )
    host: Text = Field(
        default="127.0.0.1",
        description="Address of the HTTP endpoint. 0.0.0.0 answers the whole network: put TLS in front of it.",
        json_schema_extra=cli(metavar="HOST"),
    )
    port: Port = Field(
        default=8000,
        description="Port of the HTTP endpoint; 0 lets the system choose one.",
        json_schema_extra=cli(metavar="PORT"),
    )
    default_max_tokens: int = Field(
        default=1024,
        ge=1,
        le=MAX_TOKENS,
        description="Length limit of an answer whose request names none.",
        json_schema_extra=cli(metavar="TOKENS"),
    )
    kv_tokens: int = Field(
        default=KV_TOKENS,
        ge=1,
        le=MAX_TOKENS * 100,
        description="Tokens of KV cache that each worker has to keep room for, summed over all jobs that run at once.",
        json_schema_extra=cli(metavar="TOKENS"),
    )
    admin_token: SecretStr | None = Field(
        default=None,
        description="What a client must send to POST /models/shard.",
        json_schema_extra=cli(option=""),
    )
    admin_token_file: Folder | None = Field(
        default=None,
        description="A file with the token that a client must send to POST /models/shard. AZU_ADMIN_TOKEN may hold it "
        "instead; else it is made in the data folder, as admin-token.",
        json_schema_extra=cli(metavar="FILE"),
    )
    data_dir: Folder = Field(
        default=_COORDINATOR_DIR,
        description="Holds the identity key, what workers earned and the models cut into layers. "
        "Every program that runs at once needs its own.",
        json_schema_extra=cli(metavar="FOLDER"),
    )


class CatalogueSettings(BaseAzuSettings):
    """A look into a coordinator's data folder, whether or not it runs."""

    data_dir: Folder = Field(
        default=_COORDINATOR_DIR,
        description="The coordinator's data folder.",
        json_schema_extra=cli(metavar="FOLDER"),
    )
    as_json: bool = Field(
        default=False,
        description="Print one JSON document on stdout; progress goes to stderr.",
        json_schema_extra=cli(option="--json"),
    )


class ShardSettings(CatalogueSettings):
    """A model to cut."""

    model: Text = Field(
        description="A folder of safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B or "
        "Qwen/Qwen3-0.6B@REVISION.",
        json_schema_extra=cli(metavar="MODEL"),
    )


class RemoveSettings(CatalogueSettings):
    """A model to remove."""

    model_id: Text = Field(  # not `model`: AZU_MODEL is azu-demo's, and would make a bare `remove` delete it
        description="Its id, as `azu-coordinator models` lists it.", json_schema_extra=cli(metavar="MODEL_ID")
    )


class BootstrapSettings(ListeningSettings):
    """A bootstrap node: the address that newcomers are given."""

    listen: Multiaddrs = Field(
        default=("/ip4/0.0.0.0/tcp/4001",),
        description="An address to accept peers on; port 0 lets the system choose one. May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    bootstrap: PeerAddresses = Field(
        default=(),
        description="Another bootstrap node of the same swarm, to be joined with. May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    metrics: HostPort | None = Field(
        default=None,
        description="Where to serve /healthz and Prometheus' /metrics, such as 127.0.0.1:9464. Nowhere where omitted.",
        json_schema_extra=cli(metavar="HOST:PORT"),
    )
    data_dir: Folder = Field(
        default=Path("~/.azu/bootstrap"),
        description="Holds the identity key, so that the address stays the same across restarts.",
        json_schema_extra=cli(metavar="FOLDER"),
    )


class DhtSettings(SwarmSettings):
    """A look into the swarm's DHT from outside; keeps nothing on disk."""

    bootstrap: PeerAddresses = Field(
        default=(),
        description="A peer of the swarm to ask, as `azu-bootstrap run` prints it. May be given several times.",
        json_schema_extra=cli(metavar="MULTIADDR"),
    )
    as_json: bool = Field(
        default=False,
        description="Print one JSON document instead of a table.",
        json_schema_extra=cli(option="--json"),
    )
