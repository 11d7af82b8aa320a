"""How much memory the unsplit model takes: `python -m node.engine.footprint DATA_DIR MANIFEST` prints it as JSON.

The process does what a worker with enough memory for every layer would do: it loads the whole model out of a node's
data folder, runs one token through it, and reads its own resident memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from azu.distribution import Library
from azu.errors import InputError
from azu.models.splice import StageSpec, stage_tensor_names
from node.engine.stage import find_device, load_stage, resident_bytes

__all__ = ["main"]


def main(data_dir: str, digest: str) -> None:
    """Load the model and print {"resident_bytes": N}."""
    library = Library(Path(data_dir))
    manifest = dict(library.manifests()).get(digest)
    if manifest is None:
        raise InputError(f"{data_dir} does not hold manifest {digest}")
    config = json.loads(library.store.path(manifest.config.digest).read_bytes())
    spec = StageSpec(config=config, start=0, end=manifest.n_layers, n_layers=manifest.n_layers)
    blobs = manifest.blobs_for(0, manifest.n_layers, stage_tensor_names(spec)[1])
    files = {name: library.store.path(blob.digest) for name, blob in blobs.items()}
    stage = load_stage(spec, "float32", find_device("cpu", None, 1), files, vocab_size=manifest.vocab_size)
    stage.measure_layer_us(1)
    sys.stdout.write(json.dumps({"resident_bytes": resident_bytes()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
