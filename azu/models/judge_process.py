"""The process that says whether a model can be cut into stages, started by `azu.models.judged`: `python -m` this file.

A config.json comes in on standard input, and a refusal as a JSON object goes out, empty where there is none.
"""

from __future__ import annotations

import json
import sys

from azu.errors import ModelError
from azu.models.facts import read_facts
from azu.models.splice import StageSpec, stage_tensor_names

__all__ = ["main"]


def main() -> None:
    """Judge one model."""
    config = json.load(sys.stdin)
    layers = read_facts(config).n_layers
    try:
        stage_tensor_names(StageSpec(config, 0, layers, layers))
    except ModelError as error:
        refusal = {"code": error.code, "message": error.message, "remedy": error.remedy}
    else:
        refusal = {}
    sys.stdout.write(json.dumps(refusal))


if __name__ == "__main__":
    main()
