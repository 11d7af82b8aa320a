"""A job's cache: in its slot as long as it fits there, in memory of its own else, and the same either way."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from azu.models import cache as cache_module
from azu.models.cache import GROWTH, ReservedLayer, new_cache
from azu.models.slots import POSITIONS, Slot, Slots
from tests.models.conftest import TINY

HEADS, WIDTH = 2, 4


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, width, generator=generator) for width in (WIDTH, WIDTH + 1))
    return keys, values


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    told=st.sampled_from([0, 1, 30, 100, POSITIONS, POSITIONS + 1]),
    fits=st.sampled_from([20, 64, POSITIONS]),
)
def test_it_holds_what_came_wherever_it_lies(chunks: list[int], told: int, fits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "POSITIONS", fits)
        layer = ReservedLayer(told, Slots().take())
        given_ = [states(count, seed) for seed, count in enumerate(chunks)]
        for number, (keys, values) in enumerate(given_):
            found = layer.update(keys, values)
            for kind, (held, again) in enumerate(zip(found, (layer.keys, layer.values), strict=True)):
                expected = torch.cat([each[kind] for each in given_[: number + 1]], 2)
                assert held.equal(expected)
                assert again is not None
                assert again.equal(expected)
            assert layer.get_seq_length() == layer.length == sum(chunks[: number + 1])
            assert (layer.slot is not None) == (told <= fits and layer.length <= fits)


def test_a_job_that_outgrows_its_slot_leaves_it_to_others() -> None:
    slots = Slots()
    layer = ReservedLayer(5, slots.take())
    layer.update(*states(POSITIONS, 1))
    assert slots.take() is not None
    layer.update(*states(1, 2))
    again = slots.take()
    assert again is not None
    assert again.number == 0
    assert layer.nbytes == (POSITIONS + GROWTH) * HEADS * (2 * WIDTH + 1) * 4


def test_a_system_that_gives_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Slot, "rows", refuses)
    layer = ReservedLayer(30, Slots().take())
    keys, _ = states(5, 1)
    assert layer.update(*states(5, 1))[0].equal(keys)
    assert layer.slot is None


def test_layers_of_one_job_share_its_slot_and_give_it_back_together() -> None:
    slots = Slots()
    config = transformers.LlamaConfig(**TINY)
    cache = new_cache(config, 9, slots.take())
    for layer in cache.layers:
        layer.update(*states(3, 1))
    assert {layer.slot.number for layer in cache.layers} == {0}
    other = slots.take()
    assert other is not None
    assert other.number == 1
    del cache, layer
    again = slots.take()
    assert again is not None
    assert again.number == 0
