"""How much memory is really held: by this process, and by an unsplit model in a process of its own.

`python -m node.engine.footprint DATA_DIR MANIFEST` does what a worker with enough memory for every layer would do: it
loads the whole model out of a node's data folder, runs one token through it, and prints its resident memory as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import torch

from azu.distribution import Library
from azu.errors import InputError
from azu.models.splice import StageSpec, stage_tensor_names
from node.engine.hardware import Device, find_device
from node.engine.stage import load_stage

__all__ = ["held_bytes", "main"]


def held_bytes(device: Device) -> int:
    """Bytes that count as `azu.models.memory` counts them: resident memory, or what torch reserves on a CUDA device."""
    if device.torch_name == "cpu":
        return int(psutil.Process().memory_info().rss)
    return int(torch.cuda.memory_reserved(device.torch_name))


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
    device = find_device("cpu", None, 1)
    stage = load_stage(spec, "float32", device, files, vocab_size=manifest.vocab_size)
    stage.measure_layer_us(1)
    sys.stdout.write(json.dumps({"resident_bytes": held_bytes(device)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
