"""Loads a stage, runs jobs through it, and prints what that took beside what was estimated; for test_memory.py.

`python -m tests.node.engine.memory_cases FOLDER DEVICE CASE...` prints a JSON object a case. Each runs in a fork
of this process, so that torch and transformers are imported once, and no case sees the memory of another.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import outcome
import torch
import transformers
from transformers.utils import logging as transformers_logging

from azu.models.cache import ReservedLayer
from azu.models.manifest import Manifest
from azu.models.memory import MAX_CHUNK_ROWS, MAX_JOBS, chunk_rows, stage_memory
from azu.models.prepacked import can_prepack
from azu.models.publish import publish
from azu.models.quantize import return_freed_memory
from azu.models.splice import StageSpec, stage_tensor_names
from azu.models.store import LayerStore
from azu.tickets import Sampling
from azu.wire.tensors import ACTIVATIONS, WeightFormat
from node.engine.footprint import held_bytes
from node.engine.hardware import Device, find_device
from node.engine.stage import JobState, LoadedStage, Step, load_stage

__all__ = ["CASES", "LONGER"]

PROMPTS, ANSWER = (512, 32), 4  # tokens; the estimate is for the worst: one job that has nearly all of them
THREADS = 1

Settings = dict[str, Any]
WIDE: Settings = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
WIDE |= {"num_key_value_heads": 4, "max_position_embeddings": 1024, "num_hidden_layers": 4}
GPT: Settings = {"vocab_size": 4096, "n_embd": 1024, "n_layer": 4, "n_head": 16, "n_positions": 1024}
# A large head whose name comes after its layers'.
NEOX: Settings = WIDE | {"vocab_size": 16384, "intermediate_size": 2048}
# As SmolLM2-135M is, but for the number of its layers.
SMOLLM2: Settings = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "tie_word_embeddings": True, "num_hidden_layers": 11}
FEW_EXPERTS: Settings = {"intermediate_size": 384, "num_local_experts": 8}
MANY_HEADS: Settings = {"num_key_value_heads": 16}
SHARED: Settings = WIDE | {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1408}
TIED: Settings = SHARED | {"vocab_size": 65536, "hidden_size": 256, "tie_word_embeddings": True}
EXPERTS: Settings = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
LATENT: Settings = {"kv_lora_rank": 256, "q_lora_rank": 384, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
LATENT |= {"v_head_dim": 64, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LINEAR: Settings = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "head_dim": 64}
LINEAR |= {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "num_experts": 8}


@dataclass(frozen=True)
class Case:
    """A stage of layers start..end (end exclusive) of a random model."""

    config: str
    start: int
    end: int
    settings: Settings
    dtype: WeightFormat = "float32"
    jobs: int = 0  # that share passes; with none, two that are alone in theirs
    packed: bool = False  # its layers by oneDNN, in float32


CASES = {
    "llama-int8": Case("LlamaConfig", 1, 8, WIDE | {"num_hidden_layers": 8}, "int8"),
    "gpt2": Case("GPT2Config", 0, 3, GPT),
    "gpt-neox": Case("GPTNeoXConfig", 2, 4, NEOX),
    "gemma2": Case("Gemma2Config", 0, 4, WIDE | {"head_dim": 64, "sliding_window": 128}),
    "qwen3-next": Case("Qwen3NextConfig", 1, 4, WIDE | EXPERTS | LINEAR),
    "mixtral-bfloat16": Case("MixtralConfig", 0, 4, WIDE | FEW_EXPERTS, "bfloat16"),
    "deepseek-v2-bfloat16": Case("DeepseekV2Config", 1, 4, WIDE | EXPERTS | LATENT | MANY_HEADS, "bfloat16"),
    "smollm2-first": Case("LlamaConfig", 0, 10, SMOLLM2),
    "smollm2-first-packed": Case("LlamaConfig", 0, 10, SMOLLM2, packed=True),
    "smollm2-last-bfloat16": Case("LlamaConfig", 1, 11, SMOLLM2, "bfloat16"),
    "llama-32-jobs": Case("LlamaConfig", 1, 4, SHARED, jobs=MAX_JOBS),
    "llama-tied-32-jobs": Case("LlamaConfig", 0, 4, TIED, jobs=MAX_JOBS),
}
# The model whose stage is measured for what jobs take and leave: small, but for its KV cache.
CACHING: Settings = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
CACHING |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 4, "max_position_embeddings": 1024}
JOBS = Case("LlamaConfig", 0, 3, CACHING)
# How many times as long those jobs may become as they do: their caches lie in slots, or are too long for that.
LONGER = {"jobs": 4, "jobs-without-slots": 16}


def build(folder: Path, case: Case) -> None:
    """Publish a case's model into `folder`."""
    source = folder / "source"
    config = getattr(transformers, case.config)(**case.settings)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.to(torch.float32 if case.dtype == "float32" else torch.bfloat16).save_pretrained(source)
    manifest = publish(str(source), LayerStore(folder / "store"))
    (folder / "manifest").write_bytes(manifest.to_bytes())


def measure(folder: Path, case: Case, device_name: str) -> dict[str, Any]:
    """The estimate and what was held, in bytes: after loading, at its peak, with both jobs open, at their peak."""
    device = find_device(device_name, None, THREADS)
    manifest = Manifest.from_bytes((folder / "manifest").read_bytes())
    # What only the first use of a library costs does not count: it is the process's.
    run(load(folder, manifest, case, device, case.start + 1), manifest, PROMPTS[1:])
    gc.collect()
    return_freed_memory()
    before = held_bytes(device)
    peak = start_peak(device)
    stage = load(folder, manifest, case, device, case.end)
    held = {"loaded": held_bytes(device) - before, "load_peak": peak() - before}
    peak = start_peak(device)
    jobs = run_mixed(stage, case.jobs) if case.jobs else run(stage, manifest, PROMPTS)
    held |= {"open": held_bytes(device) - before, "run_peak": peak() - before}
    room = sum(job.position for job in jobs)
    estimate = stage_memory(manifest, case.start, case.end, case.dtype, room, len(jobs), packed=case.packed)
    compiles = device.torch_name == "cpu" and can_prepack(getattr(torch, ACTIVATIONS[case.dtype]))
    without = replace(estimate, kernels=0).total
    least = estimate.total if case.dtype == "float32" and compiles and not case.packed else without
    return {**held, **asdict(estimate), "least": least, "most": estimate.total if compiles else without}


def run_mixed(stage: LoadedStage, count: int) -> list[JobState]:
    """So many jobs that share passes: each number of them at a time, and in the end all, a chunk of a prompt beside."""
    rows = [count - index + (1 if index else MAX_CHUNK_ROWS) for index in range(count)]  # of each job, over all passes
    jobs = [stage.open_job(Sampling(temperature=1.0), (), each) for each in rows]

    def step(job: JobState, rows: int) -> Step:
        if stage.is_first:
            return Step(job, tuple(range(rows)), rows, sample=True)
        return Step(job, bytearray(random_states(stage, rows)), rows, sample=True)

    passes = [[step(job, 1) for job in jobs[:size]] for size in range(1, count + 1)]
    passes.append([step(jobs[0], MAX_CHUNK_ROWS), *(step(job, 1) for job in jobs[1:])])
    for each in passes:
        assert all(isinstance(result, outcome.Value) for result in stage.run_steps(each))
    assert [job.position for job in jobs] == rows
    return jobs


def random_states(stage: LoadedStage, rows: int) -> bytes:
    """Hidden states [rows, hidden] as they travel."""
    return torch.randn(rows, stage.hidden_size).to(stage._dtype).view(torch.uint8).numpy().tobytes()


def measure_jobs(folder: Path, case: Case, device_name: str, longer: int) -> dict[str, Any]:
    """What jobs that share passes add, and what is left of them and of a thousand more, in bytes."""
    device = find_device(device_name, None, THREADS)
    manifest = Manifest.from_bytes((folder / "manifest").read_bytes())
    stage = load(folder, manifest, case, device, case.end)
    tokens, count = 256 - ANSWER, 8

    def held() -> int:
        gc.collect()
        return_freed_memory()
        return held_bytes(device)

    run_together(stage, tokens, count, longer)
    run_together(stage, 2, MAX_JOBS, longer)
    before = held()
    jobs = run_together(stage, tokens, count, longer)
    in_slots = {
        layer.slot is not None for job in jobs for layer in job.cache.layers if isinstance(layer, ReservedLayer)
    }
    figures = {"grown": held() - before}
    kv = stage_memory(manifest, case.start, case.end, case.dtype, count * (tokens + ANSWER), count).kv
    del jobs
    figures["left"] = held() - before
    for _ in range(0, 1_000, MAX_JOBS):
        run_together(stage, 2, MAX_JOBS, longer)
    return {**figures, "kv": kv, "left_of_many": held() - before, "in_slots": [*in_slots]}


def run_together(stage: LoadedStage, prompt: int, count: int, longer: int) -> list[JobState]:
    """So many jobs of a first stage: a prompt each, and a few more tokens in passes that they share.

    They may come to need many times as much, which costs nothing until they do.
    """
    jobs = [stage.open_job(Sampling(temperature=1.0), (), longer * (prompt + ANSWER)) for _ in range(count)]
    steps = [Step(job, tuple(range(prompt)), prompt, sample=True) for job in jobs]
    together = max(1, MAX_CHUNK_ROWS // prompt)
    passes = [steps[at : at + together] for at in range(0, count, together)]
    passes += [[Step(job, (1,), 1, sample=True) for job in jobs]] * ANSWER
    for each in passes:
        assert all(isinstance(result, outcome.Value) for result in stage.run_steps(each))
    assert all(job.position == prompt + ANSWER for job in jobs)
    return jobs


def load(folder: Path, manifest: Manifest, case: Case, device: Device, end: int) -> LoadedStage:
    """Layers up to `end`, as a worker loads them."""
    store = LayerStore(folder / "store")
    config = json.loads(store.path(manifest.config.digest).read_bytes())
    spec = StageSpec(config=config, start=case.start, end=end, n_layers=manifest.n_layers)
    blobs = manifest.blobs_for(case.start, end, stage_tensor_names(spec)[1])
    files = {name: store.path(blob.digest) for name, blob in blobs.items()}
    return load_stage(spec, case.dtype, device, files, vocab_size=manifest.vocab_size, packed=case.packed)


def run(stage: LoadedStage, manifest: Manifest, prompts: Iterable[int]) -> list[JobState]:
    """One job for each prompt: the prompt in the node's chunks, and a few more tokens."""
    rows = chunk_rows(manifest.hidden_size, stage.dtype)
    jobs: list[JobState] = []
    for prompt in prompts:
        jobs.append(stage.open_job(Sampling(temperature=1.0, top_p=0.9), (), prompt + ANSWER))
        counts = [*[rows] * (prompt // rows), prompt % rows, *[1] * ANSWER]
        for count in filter(None, counts):
            if stage.is_first:
                stage.run_steps([Step(jobs[-1], tuple(range(count)), count, sample=True)])
            else:
                stage.run_steps([Step(jobs[-1], bytearray(random_states(stage, count)), count, sample=True)])
    return jobs


def start_peak(device: Device) -> Callable[[], int]:
    """Begin to watch for the most memory that is held at once; the function returned says it, in bytes."""
    if device.torch_name != "cpu":
        torch.cuda.reset_peak_memory_stats(device.torch_name)
        return lambda: int(torch.cuda.memory_stats(device.torch_name)["reserved_bytes.all.peak"])
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    return peak


def forked(work: Callable[[], object]) -> None:
    """Run `work` in a fork; print what it returns."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            result = work()
            if result is not None:
                print(json.dumps(result), flush=True)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit(f"{work} failed")


def main(root: str, device: str, *names: str) -> None:
    transformers_logging.disable_progress_bar()
    for name in names:
        case, folder = CASES.get(name, JOBS), Path(root) / name
        folder.mkdir()
        forked(partial(build, folder, case))
        forked(partial(measured, name, folder, case, device))


def measured(name: str, folder: Path, case: Case, device: str) -> dict[str, Any]:
    if case is JOBS:
        return {"case": name, **measure_jobs(folder, case, device, LONGER[name])}
    return {"case": name, **measure(folder, case, device)}


if __name__ == "__main__":
    main(*sys.argv[1:])
