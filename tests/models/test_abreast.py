"""Jobs' tokens that are attended to in one call: as each alone, however their caches lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from azu.models import abreast, packing
from azu.models.abreast import find_abreast
from azu.models.cache import new_cache
from azu.models.packing import Pack
from azu.models.slots import POSITIONS, Slots, has_slots
from tests.models.conftest import TINY

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not has_slots(torch.device("cpu")), reason="slots are for Linux"),
]
HEADS, KV_HEADS, WIDTH = 4, 2, 8
CONFIG = transformers.LlamaConfig(**TINY)


def random(seed: int, heads: int, tokens: int) -> torch.Tensor:
    """[1, heads, tokens, width] in the layout that projections give."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, WIDTH, generator=generator).transpose(1, 2)


def filled(slots: Slots | None, lengths: Sequence[int]) -> list[Any]:
    """A cache of each length; in slots if there are any."""
    caches = [new_cache(CONFIG, 0, slots.take() if slots else None) for _ in lengths]
    for number, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        for layer in cache.layers if length else ():
            layer.update(random(2 * number, KV_HEADS, length), random(2 * number + 1, KV_HEADS, length))
    return caches


def attended(caches: Sequence[Any], rows: Sequence[int], **scores: Any) -> list[torch.Tensor]:
    """What a pass gives in each of two layers."""
    pack, total = Pack(caches, rows), sum(rows)
    found = []
    for layer in range(2):
        pack.update(random(100 + layer, KV_HEADS, total), random(200 + layer, KV_HEADS, total), layer)
        found.append(pack.attend(None, random(300 + layer, HEADS, total), None, **scores))
    return found


@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 7])), min_size=2, max_size=7
    ),
    order=st.randoms(use_true_random=False),
    scores=st.sampled_from([{}, {"softcap": 5.0}, {"sinks": torch.tensor([0.5, 1.0, -1.0, 2.0])}]),
    in_vain=st.sampled_from([0, 20, 128, 10_000]),
)  # fmt: skip
def test_as_each_alone(jobs: list[tuple[int, int]], order: Any, scores: dict[str, Any], in_vain: int) -> None:
    """Some of the jobs, in any order: slots between are others', which have caches too."""
    chosen = order.sample(range(len(jobs)), order.randint(1, len(jobs)))
    lengths, rows = [length for length, _ in jobs], [jobs[job][1] for job in chosen]
    together, apart = filled(Slots(), lengths), filled(None, lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abreast, "_IN_VAIN", in_vain)
        got = attended([together[job] for job in chosen], rows, **scores)
    expected = attended([apart[job] for job in chosen], rows, **scores)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == (1, sum(rows), HEADS, WIDTH)
        assert torch.allclose(one, other, atol=1e-5)
    for mine, theirs in zip(together, apart, strict=True):
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert one.length == other.length
            assert not one.length or (one.keys.equal(other.keys) and one.values.equal(other.values))


def test_one_call_for_all_that_lie_close(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(query: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(len(query))
        return attend(query, *arguments, **named)

    attend = packing._attend
    monkeypatch.setattr(packing, "_attend", counted)
    attended(filled(Slots(), [30, 35, 31, 90]), [1, 1, 1, 1])
    assert calls == [4, 4], "one in each of two layers"
    calls.clear()
    attended(filled(Slots(), [30, 35, 1_500, 31]), [1, 1, 1, 1])
    assert calls == [3, 1, 3, 1], "what is much longer goes alone, and its slot is passed over"
    calls.clear()
    attended(filled(Slots(), [30, 35, 40]), [1, 5, 1])
    assert calls == [2, 1, 2, 1], "so does a prompt"


def test_only_slots_that_lie_apart_are_copied() -> None:
    caches = filled(Slots(), [30, 40, 50, 60])
    run, apart = find_abreast(caches, [1] * 4), find_abreast([caches[0], caches[1], caches[3]], [1] * 3)
    assert run is not None
    assert apart is not None
    assert (run.jobs, run.copied, run.in_vain) == ([0, 1, 2, 3], 0, 30 + 20 + 10)
    assert (apart.jobs, apart.copied, apart.in_vain) == ([0, 1, 2], 3 * 61, 30 + 20 + 3 * 61 // 4)
    long = filled(Slots(), [380] * 20)
    assert find_abreast(long, [1] * 20) is not None, "as they lie there is no copy"
    few = find_abreast(long[::-1], [1] * 20)
    assert few is not None
    assert len(few.jobs) == 4_096 // 381, "no more memory than that"


def test_who_cannot_be_there() -> None:
    caches = filled(Slots(), [30, POSITIONS, 0])
    assert find_abreast(caches, [1, 1, 1]) is None, "one has no room for more, and one has nothing yet"
    assert find_abreast(filled(None, [30, 31]), [1, 1]) is None
    windowed = transformers.MistralConfig(**TINY, sliding_window=8)
    assert find_abreast([new_cache(windowed, 9, Slots().take()) for _ in range(2)], [1, 1]) is None
