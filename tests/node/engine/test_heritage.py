"""A job's KV cache, read piece by piece from one stage and appended to another: the job goes on to the last bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

from azu.errors import InternalError
from azu.models.cache import new_cache
from azu.tickets import Sampling
from node.engine import heritage
from node.engine.heritage import Piece, form_of, pieces
from node.engine.stage import JobState, LoadedStage, Step
from tests.models.conftest import TINY
from tests.node.real_stages import TinyModel, tiny_model

ROWS = 37


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def step(job: JobState, rows: int, sample: bool = False) -> object:
    """What the next rows give."""
    stage = job.stage
    inputs = tuple(range(3, 3 + rows)) if stage.is_first else bytearray(
        torch.randn(rows * stage.hidden_size, generator=torch.Generator().manual_seed(rows)).numpy().tobytes()
    )  # fmt: skip
    output = stage.run_steps([Step(job, inputs, rows, sample)])[0].unwrap()
    return output.token if stage.is_last else bytes(output.body)


def moved(job: JobState, stage: LoadedStage) -> JobState:
    """The job in another stage."""
    heir = stage.open_job(Sampling(), (), ROWS + 9)
    form = heir.stage.cache_form()
    assert form is not None
    assert form == job.stage.cache_form()
    for piece in pieces(form, job.position):
        body = bytearray(job.stage.read_piece(job, piece))
        assert len(body) == form.row_bytes(piece.layer) * piece.rows
        heir.stage.write_piece(heir, form, piece, body)
    heir.position = job.position
    return heir


@pytest.mark.parametrize("piece_bytes", [1, 1_000, 1 << 20])
@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 3), (2, 4), (0, 4)])
def test_the_job_goes_on_to_the_last_bit(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, start: int, end: int, piece_bytes: int
) -> None:
    monkeypatch.setattr(heritage, "_PIECE_BYTES", piece_bytes)
    job = model.stage(start, end).open_job(Sampling(), (), ROWS + 9)
    step(job, ROWS)
    heir = moved(job, model.stage(start, end))
    for _ in range(3):
        assert step(heir, 1, sample=True) == step(job, 1, sample=True)
    for mine, theirs in zip(heir.cache.layers[:-1], job.cache.layers[:-1], strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def test_what_was_read_once_stays_right_while_the_job_runs_on(model: TinyModel) -> None:
    stage = model.stage(1, 3)
    job = stage.open_job(Sampling(), (), 4)  # so that it has to grow
    step(job, ROWS)
    before = bytes(stage.read_piece(job, Piece(0, 5, 20)))
    step(job, 300)
    assert bytes(stage.read_piece(job, Piece(0, 5, 20))) == before


def test_windows_and_empty_caches_cannot_be_handed_over() -> None:
    plain = transformers.LlamaConfig(**TINY)
    windowed = transformers.MistralConfig(**TINY, sliding_window=8)
    for config in (plain, windowed):
        cache = new_cache(config, 8)
        cache.layers.append(cache.layers[0])  # nobody's, as in a stage
        assert form_of(cache) is None


def test_a_piece_that_does_not_fit_is_an_error_of_its_own(model: TinyModel, tmp_path: Path) -> None:
    stage = model.stage(1, 3)
    job, form = stage.open_job(Sampling()), stage.cache_form()
    assert form is not None
    with pytest.raises(InternalError):
        stage.write_piece(job, form, Piece(0, 0, 5), bytearray(os.urandom(7)))
