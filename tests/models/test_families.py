"""Every family in stages gives bit by bit what it gives in one piece."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from azu.models.judged import PROVEN
from azu.models.prepacked import PrepackedLinear, can_prepack
from azu.models.publish import publish
from azu.models.quantize import held_weights
from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from tests.models.conftest import Published
from tests.models.families import FAMILIES, OTHERS, Family, architecture, save, table
from tests.models.running import build, in_stages, one_by_one, step_by_step, tensors_of, unsplit

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
TOKENS = torch.randint(3, 64, (27,), generator=torch.Generator().manual_seed(1))
PROMPT, ANSWER = TOKENS[:11], TOKENS[11:]
pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY = {family.name: family for family in FAMILIES + OTHERS}
# One family of each kind of cache, and the bytes of 4 layers in bfloat16 after a prompt of 11 tokens and one more: 64
# bytes a token in a layer of 2 heads of 8, of all 12 tokens or of the window of 8.
KINDS = {
    "Llama": 4 * 12 * 64,
    "Mistral": 4 * 8 * 64,
    "Gemma 2": 2 * (12 + 8) * 64,
    "GPT-OSS": 2 * (12 + 8) * 64,
    "Llama 4 text": (12 + 3 * 8) * 64,
    "DeepSeek-V2": 4 * 12 * (16 + 4) * 2,
    "Qwen3-Next": 12 * 64 + 3 * (64 * 4 * 2 + 4 * 8 * 8 * 4),  # recurrent states stay in float32
    "LFM2": 12 * 64 + 3 * 32 * 3 * 2,
    "Falcon-H1": 4 * (12 * 64 + (64 + 2 * 8) * 4 * 2 + 8 * 8 * 8 * 4),
}


class Models:
    """Published models, and stages of them; each is made once, so that all tests run their jobs on the same stages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.published = cache(self._publish)
        self.stage = cache(self._stage)

    def stages(self, name: str, cut: tuple[int, ...]) -> list[Stage]:
        return [self.stage(name, *part) for part in pairwise(cut)]

    def _publish(self, name: str) -> Published:
        folder = self._folder / str(list(FAMILY).index(name))
        save(FAMILY[name], folder / "source")
        store = LayerStore(folder / "store")
        return Published(publish(str(folder / "source"), store), store, folder / "source")

    def _stage(self, name: str, start: int, end: int) -> Stage:
        return build(self.published(name), start, end)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("families"))


def check(models: Models, name: str, cuts: list[tuple[int, ...]]) -> None:
    expected = unsplit(models.published(name).source, one_by_one(PROMPT, ANSWER))
    assert all((one - other).abs().max() > 0.01 for one, other in pairwise(expected))  # each token counts
    for cut in cuts:
        got = in_stages(models.stages(name, cut), one_by_one(PROMPT, ANSWER))
        assert [tensor.shape for tensor in got] == [(1, 64)] * 17
        assert all(one.equal(other) for one, other in zip(got, expected, strict=True)), cut


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_cut_gives_the_same_bits(models: Models, family: Family) -> None:
    last = models.published(family.name).manifest.n_layers
    inside = range(1, last)
    cuts = [*((0, a, last) for a in inside), *((0, a, b, last) for a, b in combinations(inside, 2))]
    check(models, family.name, cuts)


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_a_cut_at_each_layer_gives_the_same_bits(models: Models, family: Family) -> None:
    check(models, family.name, [(0, 1, 2, 3, 4)])


@pytest.mark.parametrize("family", FAMILIES + OTHERS, ids=lambda family: family.name)
def test_parts_of_a_stage_give_the_same_bits_while_the_whole_is_used(models: Models, family: Family) -> None:
    """Of a stage that is the whole model, and of one that begins and ends inside of it."""
    last = models.published(family.name).manifest.n_layers
    whole, inner = models.stage(family.name, 0, last), models.stage(family.name, 1, last - 1)
    chains = [
        [whole],
        [whole.part(start, end) for start, end in pairwise((0, 1, 3, last))],
        [whole.part(0, 2), whole.part(2, last)],
        [whole.part(0, 1), inner.part(1, 2), inner.part(2, last - 1), whole.part(last - 1, last)],
    ]
    held = {id(tensor) for stage in (whole, inner) for tensor in tensors_of(stage)}
    for stage in (stage for chain in chains for stage in chain):
        assert {id(tensor) for tensor in tensors_of(stage)} <= held, "a part has a tensor of its own"
    one, other = one_by_one(PROMPT, ANSWER), one_by_one(TOKENS[13:20], TOKENS[4:20])
    expected = unsplit(models.published(family.name).source, one)
    jobs = [step_by_step(chain, one) for chain in chains]
    others = [step_by_step(chain, other) for chain in chains]
    for wanted, *turn in zip(expected, *jobs, *others, strict=True):
        assert all(each.equal(wanted) for each in turn[:4])
        assert all(each.equal(turn[4]) for each in turn[5:])


@pytest.mark.parametrize("name", [*KINDS, "Llama, tied", "Phi-3"])  # rotary tables that grow with the job
def test_jobs_that_take_turns_do_not_change_each_other(models: Models, name: str) -> None:
    stages = models.stages(name, (0, 1, 3, 4))
    other = TOKENS.flip(0)
    jobs = [one_by_one(PROMPT, ANSWER), one_by_one(other[:5], other[5:21])]
    alone = [in_stages(stages, job) for job in jobs]
    left = step_by_step(stages, [TOKENS, TOKENS])
    next(left)  # and is cancelled after its first step
    turns = zip(*(step_by_step(stages, job) for job in jobs), strict=True)
    for got, *expected in zip(turns, *alone, strict=True):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_in_chunks(models: Models, name: str) -> None:
    stages = models.stages(name, (0, 1, 3, 4))
    whole = in_stages(stages, one_by_one(PROMPT, ANSWER))
    # Products of other shapes are summed in another order, so the last bits may differ.
    chunked = in_stages(stages, [*PROMPT.split(4), *ANSWER.split(1)])[2:]
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert one.argmax() == other.argmax()


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_counts_all_that_it_holds(models: Models, name: str) -> None:
    stage = build(models.published(name), 0, 4, torch.bfloat16)
    cache = stage.new_cache(12)
    assert stage.cache_bytes(cache) == 0
    for position, part in ((0, PROMPT), (11, ANSWER[:1])):
        logits = stage.forward(part, cache, position)
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()
    assert stage.cache_bytes(cache) == KINDS[name]


@pytest.mark.skipif(not can_prepack(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")
@pytest.mark.parametrize("family", FAMILIES + OTHERS, ids=lambda family: family.name)
def test_prepacked_weights_give_the_same(models: Models, family: Family) -> None:
    published = models.published(family.name)
    last = published.manifest.n_layers
    spec = StageSpec(published.config, 1, last, last)
    paths = published.paths(1, last, stage_tensor_names(spec)[1])
    stage = build_stage(spec, torch.bfloat16, "cpu", paths, held_weights("bfloat16", torch.device("cpu")))
    layers = [module for module in stage.model.modules() if isinstance(module, PrepackedLinear)]
    assert layers
    hidden = torch.randn((11, stage.hidden_size), generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = one_by_one(hidden[:9], hidden[9:])
    got = in_stages([stage], parts)
    for layer in layers:
        assert isinstance(layer, PrepackedLinear), "the family's forward read its weight"
        assert layer.weight.layout == torch.strided  # read, and so plain from here on
    assert not any(isinstance(layer, PrepackedLinear) for layer in layers)
    for one, other in zip(got, in_stages([stage], parts), strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-Neo", "Llama 4 text"])
def test_windows_are_short_enough_to_matter(models: Models, name: str) -> None:
    model = models.published(name)
    wide = {key: 64 for key in ("sliding_window", "window_size", "attention_chunk_size") if key in model.config}
    assert wide
    spec = StageSpec(model.config | wide, 0, 4, 4)
    stage = build_stage(spec, torch.float32, "cpu", model.paths(0, 4, stage_tensor_names(spec)[1]))
    seen, all_seen = (in_stages([one], [TOKENS])[0] for one in (build(model, 0, 4), stage))
    assert (seen - all_seen).abs().max() > 0.1


def test_the_document_has_the_tables() -> None:
    text = DOCUMENT.read_text()
    for families in (FAMILIES, OTHERS):
        assert table(families) in text, "run python -m tests.models.families and paste its tables into docs/models.md"


def test_what_is_published_without_a_look_at_its_forward_is_what_runs_here() -> None:
    assert {architecture(family.build_config()).__name__ for family in FAMILIES + OTHERS} == PROVEN
