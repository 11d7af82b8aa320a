"""A loaded stage at its limits: what cannot be loaded or run is said by name, and nothing outlives its last use."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from azu.errors import CapacityError, InternalError, ModelError
from azu.models.abreast import find_abreast
from azu.models.publish import publish
from azu.models.slots import has_slots
from azu.models.splice import StageSpec, stage_tensor_names
from azu.models.store import LayerStore
from azu.records import Speed
from azu.tickets import Sampling
from azu.wire.tensors import WeightFormat
from node.engine.hardware import find_device
from node.engine.stage import JobState, LoadedStage, Step, load_stage
from tests.models.conftest import TINY, Published

Load = Callable[..., LoadedStage]
VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads layers of a random model."""
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(folder / "source")
    store = LayerStore(folder / "store")
    model = Published(publish(str(folder / "source"), store), store, folder / "source")

    def load(start: int, end: int, dtype: WeightFormat = "float32", vocab_size: int = VOCAB) -> LoadedStage:
        spec = StageSpec(model.config, start, end, 4)
        files: dict[str, Path] = model.paths(start, end, stage_tensor_names(spec)[1])
        return load_stage(spec, dtype, find_device("cpu", None, 1), files, vocab_size=vocab_size)

    return load


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run(stage: LoadedStage, job: JobState) -> None:
    inputs = (3, 4, 5) if stage.is_first else bytearray(3 * 4 * stage.hidden_size)
    stage.run_steps([Step(job, inputs, 3, sample=True)])[0].unwrap()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("start", "end"), [(0, 4), (0, 2), (1, 3), (2, 4)])
def test_nothing_outlives_its_last_use(load: Load, start: int, end: int) -> None:
    """The next job's cache and the next model need the room at once, not when Python looks for circles."""
    stage = load(start, end)
    job = stage.open_job(Sampling(), (), 8)
    run(stage, job)
    weight, cache = (weakref.ref(held) for held in (next(stage._stage.model.parameters()), job.cache.layers[0]))
    del job
    assert cache() is None
    del stage
    assert weight() is None


@pytest.mark.usefixtures("no_collector")
def test_jobs_of_one_part_share_it_and_nothing_outlives_the_stage(load: Load) -> None:
    stage = load(0, 4)
    parts = [(0, 4), (1, 3), (1, 3), (2, 4), (0, 2)]
    jobs = [stage.open_job(Sampling(), (), 8, part=part) for part in parts]
    assert jobs[0].stage is stage
    assert jobs[1].stage is jobs[2].stage
    assert [(job.stage.is_first, job.stage.is_last) for job in jobs] == [
        *((True, True), (False, False), (False, False), (False, True), (True, False))
    ]
    assert [job.sampler is not None for job in jobs] == [True, False, False, True, False]
    assert [stage.go_on(job, Sampling(), (), (5,)).sampler is not None for job in jobs] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert [len(job.cache.layers) - 1 for job in jobs] == [4, 2, 2, 2, 2]  # and one for who asks where there is none
    for job in jobs:
        run(job.stage, job)
    weight = weakref.ref(next(stage._stage.model.parameters()))
    del job, jobs, stage
    assert weight() is None


def test_parts_that_are_kept_are_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.engine.stage._MAX_PARTS", 2)
    stage = load(0, 4)
    one, two = (stage.open_job(Sampling(), (), 8, part=part).stage for part in ((0, 1), (0, 2)))
    assert stage.open_job(Sampling(), (), 8, part=(0, 1)).stage is one
    running = stage.open_job(Sampling(), (), 8, part=(0, 2))
    stage.open_job(Sampling(), (), 8, part=(0, 3))  # (0, 1) goes
    assert stage.open_job(Sampling(), (), 8, part=(0, 2)).stage is two
    assert stage.open_job(Sampling(), (), 8, part=(0, 1)).stage is not one
    run(running.stage, running)


@pytest.mark.parametrize(("start", "end"), [(0, 4), (0, 2), (1, 3), (2, 4)])
def test_a_stage_measures_itself_and_goes_on_with_its_jobs(load: Load, start: int, end: int) -> None:
    stage = load(start, end)
    assert stage.pace.speed() == Speed()
    stage.measure_pace(64)
    first = stage.pace.speed()
    assert first.decode_base_ns + first.decode_token_ns > 0
    assert first.prefill_ns > 0
    job = stage.open_job(Sampling(), (), 8, (start, start + 1))
    run(job.stage, job)  # of three rows, which is no measure
    assert stage.pace.speed() == first
    one = Step(job, (3,) if job.stage.is_first else bytearray(4 * stage.hidden_size), 1, sample=True)
    job.stage.run_steps([one])[0].unwrap()
    assert stage.pace.speed() != first


@pytest.mark.parametrize("part", [(0, 3), (1, 5), (2, 2), (3, 2), (-1, 2)])
def test_what_is_no_part_of_the_stage(load: Load, part: tuple[int, int]) -> None:
    with pytest.raises(ModelError) as caught:
        load(1, 4).open_job(Sampling(), (), 8, part=part)
    assert caught.value.code == "bad_layer_range"


def test_a_failure_inside_a_family_is_an_error_of_ours(load: Load) -> None:
    stage = load(0, 2)
    with pytest.raises(InternalError) as caught:  # torch raises an IndexError
        stage.run_steps([Step(stage.open_job(Sampling()), (VOCAB,), 1, sample=False)])[0].unwrap()
    assert caught.value.code == "stage_failed"
    run(stage, stage.open_job(Sampling()))


@pytest.mark.parametrize(("part", "vocab_size"), [((0, 2), VOCAB + 1), ((2, 4), VOCAB - 1)])
def test_a_vocabulary_that_is_not_the_manifests(load: Load, part: tuple[int, int], vocab_size: int) -> None:
    with pytest.raises(ModelError) as caught:
        load(*part, vocab_size=vocab_size)
    assert caught.value.code == "bad_manifest"
    load(1, 2, vocab_size=vocab_size)  # no token ids here


def exhausted(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_while_weights_become_integers(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("azu.models.integer_weights", exc_type=ImportError)
    monkeypatch.setattr(module, "integer_weight", exhausted)
    with pytest.raises(CapacityError) as caught:
        load(0, 2, "int8")
    assert caught.value.code == "device_out_of_memory"


def test_out_of_memory_in_a_job(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stage._stage, "forward", exhausted)
        with pytest.raises(CapacityError) as caught:
            run(stage, stage.open_job(Sampling()))
    assert caught.value.code == "device_out_of_memory"
    run(stage, stage.open_job(Sampling()))


@pytest.mark.parametrize(("dtype", "is_packed"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_a_job_that_is_alone_computes_the_same_by_the_faster_way(
    load: Load, monkeypatch: pytest.MonkeyPatch, dtype: WeightFormat, is_packed: bool
) -> None:
    """As a pack of one where that is faster, for decoded tokens; a pack that fails is computed the other way."""
    stage, packed = load(1, 3, dtype), []
    original = stage._stage.forward_pack

    def noted(parts: Any) -> torch.Tensor:
        packed.append(len(parts[0].inputs))
        if len(packed) == 3:
            raise RuntimeError("not this time")
        return original(parts)

    monkeypatch.setattr(stage._stage, "forward_pack", noted)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, stage.hidden_size, generator=generator).to(stage._dtype)
    jobs = [stage.open_job(Sampling(), (), 32) for _ in range(2)]
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
        body = bytearray(hidden[start:end].view(torch.uint8).numpy().tobytes())
        found = stage.run_steps([Step(jobs[0], body, end - start, sample=False)])[0].unwrap()
        known = stage._run_alone(Step(jobs[1], bytearray(body), end - start, sample=False))
        rows = [torch.frombuffer(bytearray(each.body), dtype=stage._dtype).float() for each in (found, known)]
        torch.testing.assert_close(*rows, rtol=0.02, atol=0.02)
    assert packed == ([1] * 5 if is_packed else [])
    assert [job.position for job in jobs] == [12, 12]


@pytest.mark.skipif(not has_slots(torch.device("cpu")), reason="slots are for Linux")
def test_a_pass_goes_through_jobs_as_their_caches_lie(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are read as one; and each has its own result, in whatever order they came."""
    stage, copied = load(0, 4), []

    def noted(caches: Any, rows: Any) -> Any:
        found = find_abreast(caches, rows)
        copied.append(found.copied if found is not None else None)
        return found

    monkeypatch.setattr("azu.models.packing.find_abreast", noted)
    prompts = [(3,), (4, 5), (6, 7, 8), (9, 10, 11, 12)]

    def answers(order: list[int]) -> list[list[int]]:
        jobs = [stage.open_job(Sampling(temperature=0), (), 32) for _ in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        rows = list(prompts)
        for _ in range(6):
            steps = [Step(jobs[job], rows[job], len(rows[job]), sample=True) for job in order]
            for job, found in zip(order, stage.run_steps(steps), strict=True):
                token = found.unwrap().token
                assert token is not None
                said[job].append(token)
                rows[job] = (token,)
        return said

    assert answers([2, 0, 3, 1]) == answers([0, 1, 2, 3])
    assert set(copied[1:6]) == {0}
    assert len({tuple(each) for each in answers([3, 2, 1, 0])}) > 1, "answers that are alike would show nothing"
