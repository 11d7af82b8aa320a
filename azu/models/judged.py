"""Whether workers can run a model at all, asked before it is downloaded or cut.

The families that the test suite runs in stages are known by name. Whether another class of transformers can be cut is
seen by building it on the meta device (`azu.models.splice`). A publisher needs no torch for anything else, so that
happens in a process of its own, and only where torch is installed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from azu.errors import ModelError
from azu.logs import log
from azu.models.facts import read_facts

__all__ = ["PROVEN", "check_architecture"]

logger = logging.getLogger(__name__)

_PATIENCE_S = 300.0  # importing torch takes most of it, on a slow disk

PROVEN = frozenset(
    {
        "ApertusForCausalLM", "ArceeForCausalLM", "BambaForCausalLM", "BloomForCausalLM", "CTRLLMHeadModel",
        "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
        "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM",
        "FalconH1ForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM",
        "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "Glm4ForCausalLM",
        "Glm4MoeForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Lfm2ForCausalLM",
        "Llama4ForCausalLM", "LlamaForCausalLM", "MiniMaxM2ForCausalLM", "Ministral3ForCausalLM", "Mistral4ForCausalLM",
        "MistralForCausalLM", "MixtralForCausalLM", "MptForCausalLM", "NemotronForCausalLM", "OPTForCausalLM",
        "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM",
        "PhimoeForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)  # fmt: skip
"""The classes of tests/models/families.py."""


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuses a model that no worker could load.

    Args:
        config: the model's config.json.

    Raises:
        ModelError: as `read_facts`; code "unsupported_architecture" or "bad_config", with the reason.
    """
    architecture = read_facts(config).architecture
    if architecture in PROVEN:
        return
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        log(logger, logging.WARNING, "whether workers can run this model is not known here", architecture=architecture)
        return
    log(logger, logging.INFO, "looking whether its layers can be cut apart", architecture=architecture)  # takes seconds
    command = [sys.executable, "-P", "-m", "azu.models.judge_process"]  # -P: nothing is imported from here
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, input=json.dumps(config), capture_output=True, text=True, check=True, timeout=_PATIENCE_S
        )
        refusal = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        problem = f"architecture {architecture[:100]} is not supported: whether it can be cut cannot be found out"
        raise ModelError(problem, code="unsupported_architecture") from error
    if refusal:
        raise ModelError(refusal["message"], code=refusal["code"], remedy=refusal["remedy"])
