"""The settings of what runs beside a worker, or without one."""

from __future__ import annotations

from pydantic import Field

from azu.config import KV_TOKENS, MAX_TOKENS, NODE_DIR, BaseAzuSettings, WorkerSettings
from azu.setting_types import Folder, JobIdText, Text, cli

__all__ = ["EarningsSettings", "LeaveSettings", "PlanSettings", "StatusSettings"]


class PlanSettings(WorkerSettings):
    """A model, and the memory to plan it for."""

    model: Text = Field(
        description="A folder of safetensors, a .gguf file, a hub id such as Qwen/Qwen3-0.6B (only headers are "
        "fetched), or a model that the data folder holds, by its id or its manifest's digest.",
        json_schema_extra=cli(metavar="MODEL"),
    )
    kv_tokens: int = Field(
        default=KV_TOKENS,
        ge=1,
        le=MAX_TOKENS * 100,
        description="Tokens of KV cache to keep room for, summed over all jobs; as the coordinator's --kv-tokens.",
        json_schema_extra=cli(metavar="TOKENS"),
    )
    as_json: bool = Field(
        default=False,
        description="Print one JSON document instead of tables, with all sizes in bytes.",
        json_schema_extra=cli(option="--json"),
    )


class LeaveSettings(BaseAzuSettings):
    """The worker that runs on a data folder."""

    data_dir: Folder = Field(
        default=NODE_DIR,
        description="The worker's data folder, as given to `azu-node join`.",
        json_schema_extra=cli(metavar="FOLDER"),
    )


class StatusSettings(LeaveSettings):
    """A look at the worker that runs on a data folder."""

    as_json: bool = Field(
        default=False,
        description="Print one JSON document: sizes in bytes, times in seconds, sums instead of means.",
        json_schema_extra=cli(option="--json"),
    )


class EarningsSettings(StatusSettings):
    """A look at what a worker has earned."""

    as_json: bool = Field(
        default=False,
        description="Print one JSON document, with times in unix seconds.",
        json_schema_extra=cli(option="--json"),
    )
    jobs: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="List so many of the last jobs, too.",
        json_schema_extra=cli(metavar="NUMBER"),
    )
    proof: JobIdText | None = Field(
        default=None,
        description="Print what proves a job instead, as JSON: its ticket as the coordinator signed it, and this "
        "worker's receipt.",
        json_schema_extra=cli(metavar="JOB_ID"),
    )
