"""`azu-node earnings` over the book of real stages that ran real jobs."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from azu.tickets import check_receipt, open_receipt, open_ticket
from azu.wire.messages import Prompt, Token
from azu.wire.tokens import pack_tokens
from node.book import Book
from node.cli import main
from tests.node.real_stages import TinyModel, next_of, prompt_of, real_ring, tiny_model

PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["earnings", *arguments])
    assert result.exit_code == code, result.output
    return result.output


async def test_jobs_are_shown_and_proven(model: TinyModel, tmp_path: Path) -> None:
    async with real_ring(model, 2) as coordinator:
        coordinator.stages[1].jobs._book = Book(tmp_path)
        folder = f"--data-dir={tmp_path}"
        assert "nothing yet" in run(folder)
        ticket = coordinator.ticket(len(PROMPT), 4)
        end = await coordinator.answer(ticket, PROMPT)
        assert end.finish == "length"
        work = (len(PROMPT) + 3) * 2  # layers 2 and 3
        facts = json.loads(run(folder, "--json"))
        [mine] = facts["coordinators"]
        assert mine["coordinator"] == coordinator.identity.peer_id
        assert (mine["jobs"], mine["unsettled"], mine["token_layers"]) == (1, 0, work)
        assert mine["earned"] == facts["total"]["earned"] == work * 2 * 8 // 10
        page = run(folder).splitlines()
        assert page[0].split() == ["coordinator", "jobs", "unsettled", "token-layers", "earned", "last", "job"]
        assert page[1].split()[:5] == [coordinator.identity.peer_id, "1", "0", str(work), str(work * 16 // 10)]

        [job] = json.loads(run(folder, "--json", "--jobs=5"))["jobs"]
        assert (job["job_id"], job["tokens"], job["settled"]) == (ticket.job_id.hex(), work // 2, True)
        assert f"job {ticket.job_id.hex()}: {work} token-layers" in run(folder, "--jobs=5")
        proof = json.loads(run(folder, f"--proof={job['job_id']}"))
        signer, proven = open_ticket(base64.b64decode(proof["ticket"]))
        assert (signer, proven) == (coordinator.identity.peer_id, ticket)
        signer, receipt = open_receipt(base64.b64decode(proof["receipt"]))
        assert check_receipt(receipt, signer=signer, ticket=ticket, stage=1) is None
        assert receipt == end.receipts[1]


async def test_a_job_that_its_coordinator_leaves_is_kept_too(model: TinyModel, tmp_path: Path) -> None:
    async with real_ring(model, 1) as coordinator:
        coordinator.stages[0].jobs._book = Book(tmp_path)
        ticket = coordinator.ticket(len(PROMPT), 2_000)
        async with coordinator.opened(ticket) as channel:
            await channel.send(Prompt(), pack_tokens(PROMPT))
            for _ in range(3):
                await next_of(channel, Token)
        while not Book(tmp_path).earned():  # written down when its room is free again
            await trio.sleep(0.01)
        total = json.loads(run(f"--data-dir={tmp_path}", "--json"))["total"]
        assert (total["jobs"], total["unsettled"], total["earned"]) == (1, 1, 0)
        proof = json.loads(run(f"--data-dir={tmp_path}", f"--proof={ticket.job_id.hex()}"))
        assert proof["tokens"] >= len(PROMPT) + 2
        assert not proof["settled"]


async def test_a_full_disk_costs_the_book_and_not_the_pay(
    model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_ring(model, 1) as coordinator:
        coordinator.stages[0].jobs._book = Book(tmp_path)
        (tmp_path / "earnings.sqlite3").write_bytes(b"damaged" * 1_000)
        end = await coordinator.answer(coordinator.ticket(len(PROMPT), 4), PROMPT)
        assert sorted(end.receipts) == [0]
        assert "earnings not written down" in [record.message for record in caplog.records]


def test_what_there_is_not_is_said(tmp_path: Path) -> None:
    assert "no book of earnings" in run(f"--data-dir={tmp_path}", code=2)
    Book(tmp_path)
    assert "nothing yet" in run(f"--data-dir={tmp_path}")
    assert "has no job" in run(f"--data-dir={tmp_path}", f"--proof={'0' * 32}", code=2)
    run(f"--data-dir={tmp_path}", "--proof=../../etc", code=2)
