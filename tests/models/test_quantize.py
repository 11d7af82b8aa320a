"""Weights in int8 and int4: the same bits in every cut, close to float32, and as small as the planner thinks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from azu.errors import InputError
from azu.models.publish import publish
from azu.models.quantize import held_weights
from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from azu.models.weight_formats import held_format, integer_bytes
from azu.wire.tensors import WeightFormat
from tests.models.conftest import Published
from tests.models.family_settings import SPARSE

SaveTiny = Callable[..., Path]

CPU = torch.device("cpu")
TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees Celsius at "
    "sea level. The earth moves around the sun once a year, and the moon moves around the earth once a month. In 1969, "
    "people walked on the moon for the first time. A dog is an animal that many people keep at home as a friend."
)
# Linear layers whose shapes int4 takes, and (a width of 48) some that fall back to int8.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": False},
    "Qwen2Config": {"tie_word_embeddings": True},
    "GPT2Config": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "Qwen2MoeConfig": SPARSE,
}


def build(published: Published, start: int, end: int, wanted: WeightFormat) -> Stage:
    spec = StageSpec(published.config, start, end, published.manifest.n_layers)
    paths = published.paths(start, end, stage_tensor_names(spec)[1])
    dtype = torch.float32 if wanted == "float32" else torch.bfloat16
    return build_stage(spec, dtype, CPU, paths, held_weights(wanted, CPU))


def run(stages: list[Stage], ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits [steps, vocab] of a prompt and greedy steps."""
    caches = [stage.new_cache() for stage in stages]
    logits, position = [], 0
    for _ in range(steps):
        hidden = ids
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(hidden, cache, position)
        position += len(ids)
        logits.append(hidden[0])
        ids = hidden.argmax(-1)
    return torch.stack(logits)


@pytest.mark.parametrize("wanted", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_changes_no_bit(family: str, wanted: WeightFormat, save_tiny: SaveTiny, store: LayerStore) -> None:
    source = save_tiny(family, **FAMILIES[family])
    published = Published(publish(str(source), store), store, source)
    ids = torch.randint(3, 64, (19,), generator=torch.Generator().manual_seed(1))
    whole = build(published, 0, 4, wanted)
    expected = run([whole], ids, 8)
    stages = [build(published, *part, wanted) for part in ((0, 1), (1, 3), (3, 4))]
    assert run(stages, ids, 8).equal(expected)
    held = {name: parameter for name, parameter in whole.model.named_parameters() if hasattr(parameter, "qdata")}
    assert not any(part in name for name in held for part in ("embed", "head", "gate."))
    projections = [name for name, parameter in whole.model.named_parameters() if "proj" in name and parameter.ndim == 2]
    assert set(projections) <= set(held)
    assert len(held) == 4 * {"GPT2Config": 4, "Qwen2MoeConfig": 4 + 3 + 4 * 2}.get(family, 7)
    # Integers are no floats, and no noise either.
    close = run([build(published, 0, 4, "float32")], ids, 1)
    error = (expected[:1].float() - close).norm() / close.norm()
    assert 0 < error < (0.03 if wanted == "int8" else 0.2)


@pytest.mark.parametrize("wanted", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(64, 64), (33, 40), (48, 96), (16, 33), (1, 32), (20, 64)])
@pytest.mark.parametrize("count", [1, 40])
def test_any_shape(shape: tuple[int, int], wanted: WeightFormat, count: int) -> None:
    from azu.models.integer_weights import integer_weight

    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=draw).bfloat16()
    inputs = torch.randn(2, count, shape[1], generator=draw).bfloat16()
    bias = torch.randn(shape[0], generator=draw).bfloat16()
    held: Any = integer_weight(weight, wanted)
    got = torch.nn.functional.linear(inputs, held, bias).float()
    exact = torch.nn.functional.linear(inputs.float(), weight.float(), bias.float())
    tolerance = 0.02 if held_format(*shape, wanted) == "int8" else 0.2
    assert (got - exact).norm() / exact.norm() < tolerance
    parts = [getattr(held, part, None) for part in ("qdata", "scale", "zero_point", "scale_and_zero")]
    assert sum(part.nbytes for part in parts if part is not None) == integer_bytes(*shape, wanted)


@pytest.mark.parametrize("another_release", [False, True])
def test_without_torchao(monkeypatch: pytest.MonkeyPatch, another_release: bool) -> None:
    monkeypatch.delitem(sys.modules, "azu.models.integer_weights", raising=False)
    if another_release:
        monkeypatch.delattr("torchao.quantization.Int8Tensor")
    else:
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="torchao") as caught:
        held_weights("int4", CPU)
    assert caught.value.code == "missing_package"
    assert "pip install 'azu[integers]'" in caught.value.remedy


def test_smollm2_says_the_same(smollm2: Published) -> None:
    """Top-1 of every position of a text, against float32. The weights were Q4_1 once, which flatters int4."""
    tokenizer = Tokenizer.from_file(str(smollm2.store.path(smollm2.manifest.tokenizer["tokenizer.json"].digest)))
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    top: dict[WeightFormat, torch.Tensor] = {}
    for wanted in ("float32", "int8", "int4"):
        stage = build(smollm2, 0, smollm2.manifest.n_layers, wanted)
        with torch.inference_mode():
            top[wanted] = stage.model(input_ids=ids[None]).logits[0].argmax(-1)
    for wanted in ("int8", "int4"):
        assert (top[wanted] == top["float32"]).float().mean() >= 0.9
