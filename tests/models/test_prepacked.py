"""Weights that oneDNN has prepacked: the same products, and plain again for whoever reads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from azu.models import prepacked
from azu.models.prepacked import PrepackedLinear, can_prepack, layers_pay, prepack
from azu.models.publish import publish
from azu.models.quantize import held_weights
from azu.models.splice import Stage, StageSpec, build_stage, stage_tensor_names
from azu.models.store import LayerStore
from azu.wire.tensors import WeightFormat
from tests.models.conftest import Published

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not can_prepack(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")


@pytest.fixture
def forget() -> Iterator[None]:
    for known in (can_prepack, layers_pay):
        known.cache_clear()
    yield
    for known in (can_prepack, layers_pay):
        known.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_torch_still_has_what_is_used() -> None:
    """A private API of torch: should a release drop or change it, stages would only be slower, and nobody would see."""
    assert can_prepack(torch.float32)
    for name in ("bf16", "fp16"):
        assert isinstance(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")(), bool)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert can_prepack(torch.bfloat16)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("problem", [RuntimeError, AttributeError, TypeError])
def test_plain_where_it_cannot_be_had(problem: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise problem

    monkeypatch.setattr(prepacked, "product", fails)
    assert not can_prepack(torch.float32)
    assert held_weights("float32", CPU) is None


@pytest.mark.usefixtures("forget")
def test_plain_where_the_product_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "product", lambda inputs, *_: inputs[:, :32])
    assert not can_prepack(torch.float32)


@needs_bfloat16
@pytest.mark.parametrize("shape", [(64, 64), (33, 40), (7, 5), (1, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_shape_and_back_to_plain(shape: tuple[int, int], bias: bool) -> None:
    plain = nn.Linear(shape[1], shape[0], bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    layer = nn.Linear(shape[1], shape[0], bias, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    layer.bias, layer.weight = plain.bias, nn.Parameter(prepack(plain.weight), requires_grad=False)
    PrepackedLinear.adopt(layer)
    inputs = torch.randn(2, 9, shape[1]).bfloat16()
    for rows in (inputs, inputs[:, -1:], inputs[:, ::3], inputs[0, 0]):
        assert torch.allclose(layer(rows), plain(rows), atol=0.01, rtol=0.01)
    assert type(layer) is PrepackedLinear
    assert layer.weight.equal(plain.weight)
    assert type(layer) is nn.Linear
    assert layer(inputs).equal(plain(inputs))


@pytest.mark.parametrize(("packed_s", "pays"), [([0.9, 0.9], True), ([1.1, 0.5], False), ([0.5, 1.1], False)])
def test_layers_pay_where_they_are_faster_alone_and_together(
    packed_s: list[float], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepacked products take so long for one row and for several; plain ones 1.0, and now and then more."""
    noise = iter([0.0, 3.0, 0.1, 0.0] * 99)

    def seconds(product: Any, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> float:
        assert all(each.shape[1] == weight.shape[1] for each, weight in zip(inputs, weights, strict=True))
        is_packed, rows = product is prepacked.product, len(inputs[0])
        return (packed_s[rows > 1] if is_packed else 1.0) + next(noise)

    monkeypatch.setattr(prepacked, "_seconds", seconds)
    layers_pay.cache_clear()
    assert layers_pay() == pays
    layers_pay.cache_clear()


@pytest.mark.usefixtures("forget")
def test_layers_do_not_pay_where_nothing_can_be_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "product", lambda inputs, *_: inputs[:, :32])
    assert not layers_pay()


def load(published: Published, start: int, end: int, wanted: WeightFormat, *, packed: bool = False) -> Stage:
    spec = StageSpec(published.config, start, end, published.manifest.n_layers)
    paths = published.paths(start, end, stage_tensor_names(spec)[1])
    dtype = torch.float32 if wanted == "float32" else torch.bfloat16
    return build_stage(spec, dtype, CPU, paths, held_weights(wanted, CPU, packed=packed))


@needs_bfloat16
@pytest.mark.parametrize("tied", [False, True])
def test_which_weights_are_prepacked(tied: bool, save_tiny: Callable[..., Path], store: LayerStore) -> None:
    source = save_tiny("LlamaConfig", tie_word_embeddings=tied)
    published = Published(publish(str(source), store), store, source)

    def held(start: int, end: int, wanted: WeightFormat, *, packed: bool = False) -> tuple[int, bool]:
        model: Any = load(published, start, end, wanted, packed=packed).model
        count = sum(isinstance(module, PrepackedLinear) for module in model.modules())
        return count, isinstance(model.get_output_embeddings(), PrepackedLinear)

    assert held(1, 2, "bfloat16") == (7, False)
    assert held(3, 4, "bfloat16") == (8, True)  # a tied head in a stage without the embedding
    assert held(0, 4, "bfloat16") == (28 + (not tied), not tied)
    assert held(1, 2, "float32") == (0, False)
    assert held(3, 4, "float32") == (1, True)
    assert held(0, 4, "float32") == (not tied, not tied)
    assert held(1, 2, "float32", packed=True) == (7, False)
    assert held(0, 4, "float32", packed=True) == (28 + (not tied), not tied)
    if importlib.util.find_spec("torchao"):
        assert held(3, 4, "int8") == (1, True)


def test_other_devices_are_left_alone() -> None:
    assert held_weights("bfloat16", torch.device("cuda:0")) is None
