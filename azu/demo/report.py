"""What the demo shows at its end: the answer as it comes, who did what, and the ways into the swarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from azu.demo.money import MoneyFigures
from azu.payments.coin import HYPE
from azu.sizes import format_size

__all__ = ["Figures", "StageFigures", "WorkerFigures", "show_answer", "show_figures", "show_money", "show_ways_in"]


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage of the answered job; `earned` in the figures' unit."""

    worker: str
    peer_id: str
    start: int
    end: int
    tokens: int
    token_layers: int
    earned: int
    state: str

    @classmethod
    def from_usage(cls, stage: dict[str, Any], worker: str) -> StageFigures:
        """Out of the `azu` part of an answer's usage."""
        start, end = stage["layers"]
        kept = {key: stage[key] for key in ("peer_id", "tokens", "token_layers", "state")}
        return cls(worker=worker, start=start, end=end, earned=int(stage["earned"]), **kept)


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """A worker process and its resident memory in bytes."""

    name: str
    peer_id: str
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that the demo measured. Times in seconds, cost and earnings in `unit`."""

    model_id: str
    n_layers: int
    prompt: str
    answer: str
    finish: str
    ttft_s: float
    tokens_per_s: float
    prompt_tokens: int
    completion_tokens: int
    token_layers: int
    cost: int
    unit: str
    stages: list[StageFigures]
    workers: list[WorkerFigures]

    def to_json(self, unsplit_bytes: int) -> dict[str, Any]:
        """Plain values, with the unsplit model's resident memory."""
        return {**asdict(self), "unsplit_resident_bytes": unsplit_bytes}


def short(peer_id: str) -> str:
    """A peer id as azu-dht shortens it: all begin alike, so the end tells them apart."""
    return f"…{peer_id[-8:]}"


def _amount(amount: int, unit: str) -> str:
    """Wei have too many digits to be read."""
    return HYPE.format(amount) if unit == HYPE.unit else f"{amount:,} {unit}"


@contextmanager
def show_answer(console: Console, prompt: str) -> Iterator[Callable[[str], None]]:
    """Print the question; the yielded function prints pieces of the answer as they come."""
    console.print(Text.assemble("\n", ("question  ", "bold"), prompt))
    console.print(Text("answer    ", "bold"), end="")

    def show(piece: str) -> None:
        console.print(Text(piece), end="", soft_wrap=True)

    yield show
    console.print("\n")


def show_figures(console: Console, figures: Figures, unsplit_bytes: int) -> None:
    """Print who did what, how fast, for how much, and with how much memory."""
    memory = {worker.peer_id: worker.resident_bytes for worker in figures.workers}
    table = Table("worker", "peer id", "layers", "token-layers", "earned", "memory")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in figures.stages:
        table.add_row(
            stage.worker,
            short(stage.peer_id),
            f"{stage.start}-{stage.end - 1}",
            f"{stage.token_layers:,}",
            _amount(stage.earned, figures.unit) + ("" if stage.state == "credited" else f" ({stage.state})"),
            format_size(memory.pop(stage.peer_id, 0)),
        )
    for worker in figures.workers:
        if worker.peer_id in memory:
            row = (worker.name, short(worker.peer_id), "spare", "0", _amount(0, figures.unit))
            table.add_row(*row, format_size(worker.resident_bytes))
    console.print(table)
    console.print(
        f"TTFT {figures.ttft_s * 1000:.0f} ms, then {figures.tokens_per_s:.1f} tokens/s; "
        f"{figures.prompt_tokens} prompt and {figures.completion_tokens} completion tokens; "
        f"{figures.token_layers:,} token-layers for {_amount(figures.cost, figures.unit)}, 80% of it to the workers."
    )
    console.print(f"Resident memory of the unsplit model in one process: {format_size(unsplit_bytes)}.")


def show_money(console: Console, money: MoneyFigures) -> None:
    """Print who has what on the chain now, and what the client may still spend."""
    console.print(f"\nWallets on the chain {money.chain}, as it has them now:")
    table = Table("whose", "wallet", "has", box=None, pad_edge=False)
    for name, amount in {"client": money.client, "platform": money.platform, **money.workers}.items():
        table.add_row(name, money.wallets[name], HYPE.format(amount))
    console.print(table)
    console.print(f"Deposit: {HYPE.format(money.deposited)}, transaction {money.deposit_tx}", soft_wrap=True)
    console.print(f"Of it the client may still spend {HYPE.format(money.available)}; the workers' wallets were empty.")


def show_ways_in(console: Console, url: str, model_id: str, multiaddr: str, python: str) -> None:
    """Print how to talk to the swarm and how to join it."""
    text = f"""
The swarm stays up until Ctrl-C.

Ask it with curl:
  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model_id}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

With the openai client:
  {python} -c 'from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
print(client.chat.completions.create(model="{model_id}",
    messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)'

Join it with another worker (here; each needs its own --data-dir):
  azu-node join {multiaddr} --listen /ip4/127.0.0.1/tcp/0 --data-dir /tmp/azu-worker

Look into it:
  azu-dht peers --bootstrap {multiaddr}
"""
    console.print(Text(text), soft_wrap=True)
