"""Layers of one input as one product: as each by itself, whoever is called in whatever order, and with what."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from azu.models import siblings
from azu.models.prepacked import PrepackedLinear, can_prepack, prepack
from azu.models.publish import publish
from azu.models.siblings import SiblingLinear, join_siblings
from azu.models.store import LayerStore
from tests.models.conftest import Published
from tests.models.test_prepacked import load

pytestmark = pytest.mark.skipif(not can_prepack(torch.float32), reason="oneDNN cannot prepack on this CPU")

SIZES = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


class Attention(nn.Module):
    def __init__(self, bias: tuple[bool, bool, bool] = (False,) * 3, width: int = 32) -> None:
        super().__init__()
        for (name, size), has_bias in zip(SIZES.items(), bias, strict=True):
            self.add_module(name, nn.Linear(width if name == "q_proj" else 32, size, has_bias))
        self.requires_grad_(requires_grad=False)

    def layers(self) -> list[nn.Module]:
        return [self._modules[name] for name in SIZES]  # type: ignore[misc]  # they are there


def packed(plain: Attention) -> Attention:
    """The same with prepacked weights, joined where they belong together."""
    made = copy.deepcopy(plain)
    for layer in made.layers():
        layer.weight = nn.Parameter(prepack(layer.weight), requires_grad=False)  # type: ignore[arg-type]
        PrepackedLinear.adopt(layer)
    join_siblings(made, lambda _: None)
    return made


def are_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_gives_what_it_gives_alone_in_any_order(order: tuple[int, ...], bias: bool) -> None:
    plain = Attention((bias,) * 3)
    joined = packed(plain)
    assert all(type(layer) is SiblingLinear for layer in joined.layers())
    inputs = [torch.randn(2, 5, 32), torch.randn(1, 1, 32), torch.randn(7, 32)]
    for rows in [*inputs, inputs[0][:, ::2]]:
        for index in order:
            assert are_close(joined.layers()[index](rows), plain.layers()[index](rows))
    for index in order:  # each with an input of its own, as no family does
        assert are_close(joined.layers()[index](inputs[index][..., :]), plain.layers()[index](inputs[index]))


def test_one_product_serves_all_and_nothing_is_held_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, calls, product = packed(Attention()), list[int](), siblings.product

    def counted(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(weight))
        return product(inputs, weight, bias)

    monkeypatch.setattr(siblings, "product", counted)
    for _ in range(2):
        inputs = torch.randn(3, 32)
        for layer in joined.layers():
            layer(inputs)
    assert calls == [40, 40]
    shared = joined.q_proj.siblings
    assert shared._inputs is None  # type: ignore[union-attr]
    assert shared._outputs == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [(True, False, True), (False, True, True)])
def test_layers_that_are_not_alike_stay_apart(bias: tuple[bool, bool, bool]) -> None:
    assert all(type(layer) is PrepackedLinear for layer in packed(Attention(bias)).layers())
    assert all(type(layer) is PrepackedLinear for layer in packed(Attention(width=16)).layers())


def test_who_reads_a_weight_gets_its_own_and_leaves_the_others_as_they_are() -> None:
    plain = Attention((True,) * 3)
    joined, rows = packed(plain), torch.randn(4, 32)
    assert joined.k_proj.weight.equal(plain.k_proj.weight)  # type: ignore[operator]
    assert [type(layer) for layer in joined.layers()] == [SiblingLinear, nn.Linear, SiblingLinear]
    for mine, other in zip(joined.layers(), plain.layers(), strict=True):
        assert are_close(mine(rows), other(rows))


def test_a_copy_over_the_same_tensors_shares_the_weight_and_nothing_else() -> None:
    joined = packed(Attention())
    weight = joined.q_proj._parameters["weight"]
    copied = copy.deepcopy(joined, {id(weight): weight})
    assert {id(layer._parameters["weight"]) for layer in (*joined.layers(), *copied.layers())} == {id(weight)}
    assert copied.q_proj.siblings is copied.v_proj.siblings is not joined.q_proj.siblings


def test_which_layers_of_a_stage_are_joined(save_tiny: Callable[..., Path], store: LayerStore) -> None:
    source = save_tiny("LlamaConfig")
    published = Published(publish(str(source), store), store, source)
    model = load(published, 1, 3, "float32", packed=True).model
    joined = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, SiblingLinear)]
    assert joined == 2 * ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
