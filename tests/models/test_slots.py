"""Slots for jobs' caches: at even distances, and memory only for what was written."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from azu.models import slots as slots_module
from azu.models.memory import MAX_JOBS
from azu.models.slots import POSITIONS, Slot, Slots, has_slots

pytestmark = pytest.mark.skipif(not has_slots(torch.device("cpu")), reason="slots are for Linux")

HEADS, WIDTH = 8, 64
ONE_BYTES = HEADS * POSITIONS * WIDTH * 4  # of a slot, in one layer's keys
LIKE = torch.empty(1, HEADS, 1, WIDTH)


def taken(slots: Slots) -> Slot:
    slot = slots.take()
    assert slot is not None
    return slot


def test_numbers_are_the_lowest_that_are_free() -> None:
    slots = Slots()
    held = [taken(slots) for _ in range(MAX_JOBS)]
    assert [slot.number for slot in held] == list(range(MAX_JOBS))
    assert slots.take() is None
    del held[7], held[3]
    assert [taken(slots).number, taken(slots).number] == [3, 3], "the first one was dropped at once"
    second = taken(slots), taken(slots)
    assert [slot.number for slot in second] == [3, 7]


def test_one_tensor_holds_all_slots_and_the_layers_are_apart() -> None:
    slots = Slots()
    one, other = taken(slots), taken(slots)
    for layer in range(2):
        for kind in range(2):
            for slot in (one, other):
                slot.rows(layer, kind, LIKE)[:] = 100 * layer + 10 * kind + slot.number
    for layer in range(2):
        for kind in range(2):
            rows = slots.rows(layer, kind)
            assert rows.shape == (MAX_JOBS, HEADS, POSITIONS, WIDTH)
            for slot in (one, other):
                assert bool((rows[slot.number] == 100 * layer + 10 * kind + slot.number).all())


def test_memory_comes_with_writing_and_goes_with_the_job() -> None:
    process, slots = psutil.Process(), Slots()
    slot, neighbour = taken(slots), taken(slots)
    neighbour.rows(0, 0, LIKE)[..., :8, :] = 5.0
    before = process.memory_info().rss
    rows = slot.rows(0, 0, LIKE)
    assert process.memory_info().rss - before < ONE_BYTES // 4, "addresses alone"
    rows[..., : POSITIONS // 2, :] = 1.0
    half = process.memory_info().rss - before
    assert ONE_BYTES * 0.4 < half < ONE_BYTES * 0.6
    del slot
    assert process.memory_info().rss - before < ONE_BYTES // 8
    again = taken(slots)
    assert again.number == 0
    assert not again.rows(0, 0, LIKE).any(), "a job finds nothing of the one before"
    assert bool((neighbour.rows(0, 0, LIKE)[..., :8, :] == 5.0).all())


def test_a_width_that_fills_no_page() -> None:
    slots = Slots()
    like = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    one, other = taken(slots), taken(slots)
    one.rows(0, 0, like)[:] = 1
    other.rows(0, 0, like)[:] = 2
    del other
    assert bool((one.rows(0, 0, like) == 1).all())
    assert (slots.rows(0, 0).stride(0) * 2) % mmap.PAGESIZE == 0


def test_none_where_addresses_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "overcommit").write_text("2\n")
    monkeypatch.setattr(slots_module, "_OVERCOMMIT", tmp_path / "overcommit")
    assert not has_slots(torch.device("cpu"))
    assert not has_slots(torch.device("cuda:0"))


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module.mmap, "MADV_NOHUGEPAGE", -1)  # EINVAL
    assert taken(Slots()).rows(0, 0, LIKE).shape[1] == HEADS
