"""A loaded stage as the rest of the node sees it: bytes in, bytes or a token out, no torch types at the surface.

Every method that touches a tensor is synchronous and must run on the device thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outcome
import torch

from azu.errors import AzuError, CapacityError, InternalError, ModelError
from azu.logs import log
from azu.models.cache import GROWTH, place_of
from azu.models.quantize import held_weights, return_freed_memory
from azu.models.splice import Part, Stage, StageSpec, build_stage
from azu.tickets import Sampling
from azu.wire.frames import Buffer
from azu.wire.tensors import ACTIVATIONS, TensorHeader, WeightFormat
from node.engine.blocks import BLOCK
from node.engine.hardware import Device
from node.engine.heritage import Form, Piece, form_of, read_piece, write_piece
from node.engine.pace import Pace
from node.engine.sampler import Sampler, sample_pack

__all__ = [
    "JobState",
    "LoadedStage",
    "Output",
    "Step",
    "load_stage",
]

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_PARTS = 8  # of a stage that are kept for the next job; the modules of one of 12 layers take about 600 KiB
_MEASURED_JOBS = 4  # that share a pass


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave: hidden states for the next stage, or (in the last stage) a token, or nothing yet."""

    tensor: TensorHeader | None = None
    body: Buffer = b""
    token: int | None = None


class JobState:
    """One job's KV cache and sampler, and the stage whose layers it goes through."""

    def __init__(self, stage: LoadedStage, cache: Any, sampler: Sampler | None) -> None:
        self.stage = stage
        self.cache = cache
        self.sampler = sampler
        self.position = 0  # positions in the cache
        self.place = place_of(cache)

    def held(self) -> list[dict[str, Any]]:
        """The cache as it is, to be put back: layers replace their tensors, or write behind what they hold."""
        return [dict(vars(layer)) for layer in self.cache.layers]

    def put_back(self, held: list[dict[str, Any]]) -> None:
        """Undo what a pass that failed has done to the cache."""
        for layer, before in zip(self.cache.layers, held, strict=True):
            vars(layer).clear()
            vars(layer).update(before)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one job has to compute next: token ids in the first stage, else hidden states [rows, hidden] as bytes that
    can be written to, whose memory is used in place. sample: whether the last stage picks a token after it.
    """

    job: JobState
    inputs: tuple[int, ...] | Buffer
    rows: int
    sample: bool


def _place(step: Step) -> int:
    return step.job.place


def _plain_strides(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The chunk's last row as a tensor of its own: for a view of the chunk, oneDNN copies a plain head's weight."""
    return (inputs[0].flatten().view(inputs[0].shape), *inputs[1:])


class LoadedStage:
    """Layers [start, end) of a model, ready to run."""

    def __init__(
        self, stage: Stage, dtype: WeightFormat, device: torch.device, vocab_size: int, pace: Pace | None = None
    ) -> None:
        self.pace = pace or Pace(shares_passes=stage.can_pack)
        self._stage = stage
        self._device = device
        self._activations = ACTIVATIONS[dtype]
        self._dtype = _DTYPES[self._activations]
        self._parts: dict[tuple[int, int], LoadedStage] = {}  # the one that was asked for last comes last
        self._form: Form | None = None
        self.dtype = dtype  # of its weights
        self.is_first = stage.is_first
        self.is_last = stage.is_last
        self.hidden_size = stage.hidden_size
        self.vocab_size = vocab_size
        self.n_layers = stage.spec.end - stage.spec.start
        self.model_layers = stage.spec.n_layers

    def open_job(
        self,
        sampling: Sampling,
        prompt: tuple[int, ...] = (),
        tokens: int = 0,
        output: tuple[int, ...] = (),
        part: tuple[int, int] | None = None,
    ) -> JobState:
        """The state of a new job, whose KV cache will come to hold `tokens` (or more).

        Args:
            prompt: needed only for a repetition penalty in the last stage.
            output: tokens that were sampled before; needed only in the last stage.
            part: the layers [start, end) that it goes through, of those that are loaded; all where omitted.

        Raises:
            ModelError: code "bad_layer_range", where they are not loaded.
            InternalError: code "stage_failed", for whatever else a family's code raises.
        """
        try:
            stage = self._part(*part) if part is not None else self
            cache = stage._stage.new_cache(tokens if self._device.type == "cpu" else min(tokens, self.kv_block))
            return self.go_on(JobState(stage, cache, None), sampling, prompt, output)
        except AzuError:
            raise
        except Exception as error:  # a border, as in _run_alone
            raise InternalError(f"the stage failed: {error}", code="stage_failed") from error

    def go_on(self, job: JobState, sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...]) -> JobState:
        """The same job, after whose prompt `output` was sampled."""
        job.sampler = Sampler(sampling, prompt, output) if job.stage.is_last else None
        return job

    def _part(self, start: int, end: int) -> LoadedStage:
        """Layers [start, end) alone, over the same weights. Jobs of a part get the same one, and so share passes."""
        spec = self._stage.spec
        if (start, end) == (spec.start, spec.end):
            return self
        part = self._parts.pop((start, end), None)
        if part is None:
            part = LoadedStage(self._stage.part(start, end), self.dtype, self._device, self.vocab_size, self.pace)
        self._parts[start, end] = part
        if len(self._parts) > _MAX_PARTS:  # its jobs keep the one that is dropped
            del self._parts[next(iter(self._parts))]
        return part

    def cache_form(self) -> Form | None:
        """What a job's cache keeps of each position; None where it cannot be handed over. Raises as a step does."""
        if self._form is None:
            job = JobState(self, self._stage.new_cache(), None)
            self.run_steps([self._blank_step(job, 1, sample=False)])[0].unwrap()
            self._form = form_of(job.cache)
        return self._form

    def read_piece(self, job: JobState, piece: Piece) -> memoryview:
        """A part of a job's cache. Raises InternalError where the device cannot."""
        try:
            return read_piece(job.cache, piece)
        except Exception as error:  # a border, as in _run_alone
            raise InternalError(f"the cache cannot be read: {error}", code="stage_failed") from error

    def write_piece(self, job: JobState, form: Form, piece: Piece, body: bytearray) -> None:
        """Append a part of another worker's cache to a job's. Raises InternalError where the device cannot."""
        try:
            write_piece(job.cache, form, piece, body, self._device)
        except Exception as error:  # a border, as in _run_alone
            raise InternalError(f"the cache cannot be written: {error}", code="stage_failed") from error

    @property
    def can_pack(self) -> bool:
        """Whether several jobs' steps can share a pass."""
        return self._stage.can_pack

    @property
    def kv_block(self) -> int:
        """Positions by which a job's KV cache takes more memory: in a system's address space it can be whole from the
        start, since a page is taken when it is written to; on a GPU it is copied to a larger place now and then.
        """
        return BLOCK if self._device.type == "cpu" else GROWTH

    @torch.inference_mode()
    def run_steps(self, steps: Sequence[Step]) -> list[outcome.Outcome[Output]]:
        """Compute a step of each of several jobs, in one pass where the family allows it.

        Each has its result or its error: CapacityError where the device's memory does not suffice, InternalError for
        whatever a family's code raises, ModelError where its logits are damaged.
        """
        if self.can_pack and (len(steps) > 1 or self._gains_alone(steps[0])):
            before = [step.job.held() for step in steps]
            ordered = sorted(steps, key=_place)  # caches that lie side by side can be read as one
            try:
                found = dict(zip(ordered, self._run_together(ordered), strict=True))
                return [found[step] for step in steps]
            except Exception as error:  # a border, as in _run_alone: one job shall not end the others
                log(logger, logging.WARNING, "a pass failed, its steps are run one by one", reason=repr(error))
                for step, held in zip(steps, before, strict=True):
                    step.job.put_back(held)
        return [outcome.capture(self._run_alone, step) for step in steps]

    def _gains_alone(self, step: Step) -> bool:
        """Whether a pack is faster for a single job: with 16-bit keys that heads share, a CPU's attention takes up to
        ten times as long head by head, as transformers calls it.
        """
        return step.rows == 1 and self._device.type == "cpu" and self._dtype != torch.float32

    def _run_together(self, steps: Sequence[Step]) -> list[outcome.Outcome[Output]]:
        started = time.perf_counter()
        parts = [Part(self._inputs(step), step.job.cache, step.job.position) for step in steps]
        result = self._stage.forward_pack(parts)
        for step in steps:
            step.job.position += step.rows
        rows = [step.rows for step in steps]
        if self.is_last:
            outputs = self._sample(steps, result)
        else:
            outputs = [outcome.Value(each) for each in self._encode(result, rows)]
        self._note_pace(started, steps)
        return outputs

    def _run_alone(self, step: Step) -> Output:
        started = time.perf_counter()
        try:
            result = self._stage.forward(self._inputs(step), step.job.cache, step.job.position)
            step.job.position += step.rows
            if self.is_last:
                [output] = self._sample([step], result)
            else:
                [output] = map(outcome.Value, self._encode(result, [step.rows]))
            self._note_pace(started, [step])
            return output.unwrap()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "the device is out of memory",
                code="device_out_of_memory",
                remedy="Give the worker a smaller --vram so that it takes fewer layers",
            ) from error
        except AzuError:
            raise
        except Exception as error:  # a border: anything may come out of a family's code
            raise InternalError(f"the stage failed: {error}", code="stage_failed") from error

    def _note_pace(self, started: float, steps: Sequence[Step]) -> None:
        if self._device.type == "cpu" or not self.is_last or any(step.sample for step in steps):  # else CUDA still runs
            self.pace.note(time.perf_counter() - started, self.n_layers, [step.rows for step in steps])

    def _inputs(self, step: Step) -> torch.Tensor:
        if isinstance(step.inputs, tuple):
            return torch.tensor(step.inputs, dtype=torch.int64, device=self._device)
        return torch.frombuffer(step.inputs, dtype=self._dtype).view(step.rows, self.hidden_size).to(self._device)

    def _sample(self, steps: Sequence[Step], logits: torch.Tensor) -> list[outcome.Outcome[Output]]:
        """A token for each step that wants one, from logits [steps, vocab]."""
        results: list[outcome.Outcome[Output]] = [outcome.Value(Output())] * len(steps)
        wanted = [(index, step.job.sampler) for index, step in enumerate(steps) if step.sample]
        samplers = [sampler for _, sampler in wanted if sampler is not None]
        if samplers:
            rows = logits if len(wanted) == len(steps) else logits[[index for index, _ in wanted]]
            for (index, _), picked in zip(wanted, sample_pack(samplers, rows), strict=True):
                if isinstance(picked, outcome.Value):
                    results[index] = outcome.Value(Output(token=picked.value))
                else:
                    results[index] = picked
        return results

    def _encode(self, hidden: torch.Tensor, rows: Sequence[int]) -> Iterator[Output]:
        """Hidden states [rows of all, hidden], as parts of their own memory with so many rows."""
        plain = hidden.to("cpu").contiguous().view(torch.uint8)
        body = memoryview(plain.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs
        headers = {each: TensorHeader(dtype=self._activations, shape=(each, self.hidden_size)) for each in set(rows)}
        start = 0
        for each in rows:
            end = start + each * plain.shape[1]
            yield Output(headers[each], body[start:end])
            start = end

    def measure_layer_us(self, steps: int = 4) -> int:
        """Microseconds per decoded token and layer: the fastest of a few steps after a warm-up."""
        job = JobState(self, self._stage.new_cache(), None)
        best = float("inf")
        for _ in range(steps + 1):
            started = time.perf_counter()
            self.run_steps([self._blank_step(job, 1, sample=False)])[0].unwrap()
            best = min(best, time.perf_counter() - started)
        return max(1, round(best * 1e6 / self.n_layers))

    def measure_pace(self, rows: int, passes: int = 2) -> None:
        """Fill `pace` before there are jobs: by a token alone, tokens of several jobs, and a prompt of `rows`.

        Raises:
            CapacityError, InternalError: as a step has it.
        """
        batches = [[rows], [1], [1] * _MEASURED_JOBS] if self.can_pack else [[rows], [1]]
        for number in range(passes + 1):
            for batch in batches:
                steps = [self._blank_step(self.open_job(Sampling()), count, sample=True) for count in batch]
                for output in self.run_steps(steps):
                    output.unwrap()
            if not number:  # in which kernels are made
                self.pace.clear()

    def _blank_step(self, job: JobState, rows: int, *, sample: bool) -> Step:
        size = rows * self.hidden_size * self._dtype.itemsize
        return Step(job, (1,) * rows if self.is_first else bytearray(size), rows, sample)


def load_stage(
    spec: StageSpec,
    dtype: WeightFormat,
    device: Device,
    files: Mapping[str, Path],
    *,
    vocab_size: int,
    packed: bool = False,
) -> LoadedStage:
    """Build a stage out of its safetensors files.

    Args:
        packed: as `azu.models.quantize.held_weights` has it.

    Raises:
        ModelError: the files or the architecture are unusable, or the vocabulary is not the manifest's.
        CapacityError: the device's memory does not suffice.
        InputError: integer weights are wanted and torchao is not installed.
    """
    computing = torch.device(device.torch_name)
    try:
        held = held_weights(dtype, computing, packed=packed)
        stage = build_stage(spec, _DTYPES[ACTIVATIONS[dtype]], computing, files, held)
        return_freed_memory()
        _check_vocabulary(stage, vocab_size)
        if stage.is_last and stage.model.dtype != torch.float32:
            head: Any = stage.model.get_output_embeddings()  # type: ignore[no-untyped-call]  # upstream
            head.register_forward_pre_hook(_plain_strides)
        return LoadedStage(stage, dtype, computing, vocab_size)
    except torch.OutOfMemoryError as error:
        raise CapacityError("the stage does not fit in the device's memory", code="device_out_of_memory") from error


def _check_vocabulary(stage: Stage, vocab_size: int) -> None:
    """Token ids are checked against `vocab_size` alone; one past the embedding's end would put a GPU out of use."""
    model: Any = stage.model
    too_few = stage.is_first and _rows(model.get_input_embeddings()) < vocab_size
    if too_few or (stage.is_last and _rows(model.get_output_embeddings()) > vocab_size):
        raise ModelError(f"the model's vocabulary is not of {vocab_size} tokens", code="bad_manifest")


def _rows(matrix: torch.nn.Module) -> int:
    return len(next(matrix.parameters()))  # a prepacked layer's `weight` would be plain from then on
