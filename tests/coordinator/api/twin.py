"""A generation service in one process: a tiny real tokenizer, scripted tokens, and a record of what was asked of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from azu.errors import NetworkError
from azu.identity import Identity
from azu.ledger import Earning, EndedJob, Ledger
from azu.models.manifest import Blob, LayerCache, Manifest
from azu.tickets import JobTicket
from coordinator.agreement import Handover
from coordinator.generation import (
    GenerationRequest,
    JobReport,
    ModelHealth,
    SampledToken,
    ServedModel,
    StageReport,
)

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 256
LAYERS = 30
MODEL_ID = "tests/tiny-chat"
PEERS = ("12D3KooWFirst", "12D3KooWSecond")

_CORPUS = ["The capital of France is Paris.", "What is the capital of France?", "user system assistant", "Hello there"]


def byte_level_tokenizer() -> Tokenizer:
    """A BPE tokenizer with ChatML's control tokens and <think>, which is added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def served_model(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    model_id: str = MODEL_ID,
    tokenizer_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    template: str | None = CHATML,
) -> ServedModel:
    """A model whose tokenizer files really are in `folder`, and nothing else of it."""
    tokenizer = byte_level_tokenizer() if tokenizer is None else tokenizer
    tokenizer_config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | (tokenizer_config or {})
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config),
        "generation_config.json": json.dumps(generation_config or {}),
    }
    if template is not None:
        texts["chat_template.jinja"] = template
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in texts}
    for name, path in files.items():
        path.write_text(texts[name], encoding="utf-8")
    return ServedModel(
        _manifest(model_id, texts, tokenizer.get_vocab_size()), files, config or {}, created=1_700_000_000
    )


def _manifest(model_id: str, texts: dict[str, str], vocab_size: int) -> Manifest:
    blob = Blob(hashlib.sha256(b"").hexdigest(), 0)
    return Manifest(
        model_id=model_id,
        revision="test",
        origin="",
        architecture="LlamaForCausalLM",
        dtype="float32",
        n_layers=LAYERS,
        hidden_size=8,
        vocab_size=vocab_size,
        context_length=CONTEXT,
        config=blob,
        tokenizer={name: Blob(hashlib.sha256(text.encode()).hexdigest(), len(text)) for name, text in texts.items()},
        layers=(blob,) * LAYERS,
        caches=(LayerCache(2),) * LAYERS,
        shared={},
        sources={},
        tied=True,
    )


@dataclass
class Twin:
    """A GenerationService. What it answers, and how it fails, is set from outside."""

    served: list[ServedModel]
    answer: str = "The capital of France is Paris."
    refusal: Exception | None = None  # raised instead of a job
    failure: Exception | None = None  # raised after `fail_after` tokens
    fail_after: int = 0
    pause_s: float = 0.0  # before each token
    stall_after: int | None = None  # tokens before it sleeps for ever
    stalling: int | None = None  # the seed of the only job that does so; of all where None
    unbegun: int | None = None  # the seed of a job that never gets so far as its first token
    begins: bool = True  # else none does
    forgets: bool = False  # what was let go
    requests: list[GenerationRequest] = field(default_factory=list)
    taken_up: list[JobTicket] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)  # tokens of jobs that were let go
    entered: int = 0
    left: int = 0
    finished: int = 0
    most_at_once: int = 0
    left_one: trio.Event = field(default_factory=trio.Event)
    stalled: trio.Event = field(default_factory=trio.Event)
    covered: bool = True
    ledger: Ledger | None = None  # which it settles in
    successors: tuple[str, ...] = ()  # in its tickets
    price: int = 2

    def models(self) -> Sequence[ServedModel]:
        return self.served

    def health(self) -> Sequence[ModelHealth]:
        missing = () if self.covered else ((10, 20), (29, 30))
        return [ModelHealth(model.model_id, self.covered, missing, 2) for model in self.served]

    def take_up(
        self, request: GenerationRequest, ticket: JobTicket, handovers: Sequence[Handover]
    ) -> AbstractAsyncContextManager[TwinGeneration]:
        self.taken_up.append(ticket)
        if self.forgets:
            raise NetworkError("the workers that knew its tokens are lost", code="tokens_lost")
        return self.generate(request)

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TwinGeneration]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.entered += 1
        self.most_at_once = max(self.most_at_once, self.entered - self.left)
        try:
            # As a real one has: failures of background tasks come out in groups.
            async with trio.open_nursery() as nursery:
                generation = TwinGeneration(self, request, f"job{self.entered}")
                if not self.begins or request.sampling.seed == self.unbegun:
                    await trio.sleep_forever()
                if request.note is not None:
                    await request.note(ticket_of(request, self.price, self.ledger, self.successors), ())
                try:
                    yield generation
                finally:
                    if self.ledger is not None and not generation.is_let_go:  # as a real one, whatever becomes of it
                        with trio.CancelScope(shield=True):
                            await generation.finish()
                nursery.cancel_scope.cancel()
        finally:
            self.left += 1
            self.left_one.set()


class TwinGeneration:
    def __init__(self, twin: Twin, request: GenerationRequest, job_id: str) -> None:
        self._twin = twin
        self._request = request
        self._job_id = job_id
        self._sampled = twin.known.get(request.job_id, 0)
        self.is_let_go = False
        self._report: JobReport | None = None
        self._tokenizer = Tokenizer.from_file(str(request.model.tokenizer_files["tokenizer.json"]))

    @property
    def job_id(self) -> str:
        return self._job_id

    async def tokens(self) -> AsyncGenerator[SampledToken]:
        twin = self._twin
        ids = self._tokenizer.encode(twin.answer, add_special_tokens=False).ids
        script = [*ids, self._request.stop_tokens[0]]
        for place, token in enumerate(script):
            await trio.sleep(twin.pause_s)
            if twin.failure is not None and place == twin.fail_after:
                raise twin.failure
            if twin.stall_after == place and twin.stalling in (None, self._request.sampling.seed):
                twin.stalled.set()
                await trio.sleep_forever()
            self._sampled = place + 1
            if token == script[-1] and place == len(ids):
                yield SampledToken(token, "stop")
            elif self._sampled == self._request.max_tokens:
                yield SampledToken(token, "length")
                return
            else:
                yield SampledToken(token, "")

    def let_go(self) -> None:
        self.is_let_go = True
        self._twin.known[self._request.job_id] = self._sampled

    async def finish(self) -> JobReport:
        await trio.lowlevel.checkpoint()
        if self._report is None:
            self._twin.finished += 1
            self._report = self._read()
            if self._twin.ledger is not None:
                await self._twin.ledger.settle(_ended(self._report, self._request), is_free=True)
        return self._report

    def _read(self) -> JobReport:
        positions = len(self._request.prompt) + self._sampled - 1 if self._sampled else 0
        half = LAYERS // 2
        stages = tuple(
            StageReport(peer, start, start + half, positions, positions * half, positions * half, "credited")
            for peer, start in zip(PEERS, (0, half), strict=True)
        )
        prompt = len(self._request.prompt)
        cost = self._twin.price * positions * LAYERS
        return JobReport(self._job_id, prompt, self._sampled, positions * LAYERS, cost, stages)


def ticket_of(
    request: GenerationRequest, price: int, ledger: Ledger | None = None, successors: tuple[str, ...] = ()
) -> JobTicket:
    """One with a single stage, by the ledger's owner."""
    peer_id = Identity(bytes(32)).peer_id
    manifest = request.model.manifest
    return JobTicket.model_validate(
        {
            "job_id": request.job_id,
            "epoch": 0,
            "manifest": manifest.digest,
            "n_layers": manifest.n_layers,
            "stages": [{"peer_id": peer_id, "start": 0, "end": manifest.n_layers}],
            "dtype": "float32",
            "prompt_tokens": len(request.prompt),
            "max_tokens": request.max_tokens,
            "stop_tokens": request.stop_tokens,
            "sampling": request.sampling,
            "price": price,
            "begun_at": 1,
            "issued_at": 1,
            "expires_at": 2,
            "coordinator": peer_id if ledger is None else ledger.owner,
            "successors": successors,
        }
    )


def _ended(report: JobReport, request: GenerationRequest) -> EndedJob:
    earnings = tuple(
        Earning(each.peer_id, each.start, each.end, each.tokens, each.token_layers, each.earned, each.state)
        for each in report.stages
    )
    digest = request.model.manifest.digest
    totals = (report.prompt_tokens, report.completion_tokens, report.token_layers, report.cost)
    return EndedJob(request.job_id.hex(), 0, digest, *totals, earnings, request.wallet, request.key_id)
