"""What breaks, and what a client or an owner then sees. A test breaks a swarm of its own, never the shared one."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import trio
from openai import OpenAI

from azu.channel import Channel
from azu.identity import Identity
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import VALIDATORS, WorkerRecord, open_worker_record
from azu.tickets import JobTicket, Sampling, StageEntry, sign_ticket
from azu.wire.messages import (
    CONTROL,
    CONTROL_PROTOCOL,
    JOB,
    JOB_PROTOCOL,
    LAYERS_PROTOCOL,
    RING,
    RING_PROTOCOL,
    GetStatus,
    Hello,
    Open,
    Refused,
    Status,
)
from node.status import fetch_status
from tests.local_swarm import LOOPBACK, LocalSwarm, Program, wait_until

SERVE = ["azu-coordinator", "serve"]
NOBODY = f"/ip4/127.0.0.1/tcp/4001/p2p/{Identity(bytes(32)).peer_id}"

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


def stranger(swarm: LocalSwarm) -> OverlayConfig:
    """A peer that nobody knows."""
    return OverlayConfig(seed=Identity.generate().seed, listen=(LOOPBACK,), server=False, validators=VALIDATORS)


async def worker_record(overlay: Overlay, worker: Program) -> WorkerRecord:
    """A worker's record, asked of itself."""
    started = worker.found("worker starting")[0]
    async with await overlay.open_stream(started["peer"], CONTROL_PROTOCOL, addrs=started["addrs"]) as stream:
        channel = Channel(stream, CONTROL)
        await channel.send(GetStatus())
        return open_worker_record(bytes((await channel.expect(Status))[1]))


def jobs_at(swarm: LocalSwarm) -> list[int]:
    """How many jobs each worker runs now."""

    async def ask() -> list[int]:
        async with open_overlay(stranger(swarm)) as overlay:
            return [(await worker_record(overlay, worker)).jobs for worker in swarm.workers]

    return trio.run(ask)


def start_story(swarm: LocalSwarm) -> openai.Stream[object]:
    """A streamed answer that would take minutes."""
    client = OpenAI(base_url=f"{swarm.url}/v1", api_key="none", max_retries=0, timeout=240)
    stream = client.chat.completions.create(
        model=swarm.model_id,
        messages=[{"role": "user", "content": "Repeat the word banana five hundred times."}],
        temperature=0,
        max_tokens=2000,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    return stream  # type: ignore[return-value]


def test_a_client_that_hangs_up_frees_every_stage(swarm: LocalSwarm) -> None:
    stream = start_story(swarm)
    assert jobs_at(swarm) == [1, 1, 1]
    stream.close()
    left = time.monotonic()
    wait_until(lambda: jobs_at(swarm) == [0, 0, 0], "the stages to free the job")
    # 2,000 tokens take over a minute here; what is measured is dominated by starting an overlay for each look.
    assert time.monotonic() - left < 30


def test_garbage_on_any_protocol_disturbs_nobody(swarm: LocalSwarm) -> None:
    stream = start_story(swarm)
    not_cbor = b"\x00\x00\x00\x04\x00\x00\x00\x00\xff\xff\xff\xff"
    garbage = [b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n", not_cbor, os.urandom(4096)]

    async def attack() -> None:
        for protocol in (CONTROL_PROTOCOL, LAYERS_PROTOCOL, JOB_PROTOCOL, RING_PROTOCOL):
            async with open_overlay(stranger(swarm)) as overlay:  # anew: this one is banned if it goes on
                for worker in swarm.workers:
                    started = worker.found("worker starting")[0]
                    for junk in garbage:
                        async with await overlay.open_stream(started["peer"], protocol, addrs=started["addrs"]) as bad:
                            await bad.send_all(junk)
                            with trio.fail_after(60):
                                while await bad.receive_some():
                                    pass  # whatever it answers, it ends the stream
                    assert (await worker_record(overlay, worker)).jobs == 1

    trio.run(attack)
    pieces = [chunk.choices[0].delta.content for _, chunk in zip(range(8), stream, strict=False)]  # type: ignore[attr-defined]
    assert len(pieces) == 8
    stream.close()
    for worker in swarm.workers:
        refusals = [str(each["event"]) for each in worker.events if each.get("logger") == "azu.overlay.inbound"]
        assert {line.split()[0] for line in refusals} >= {
            CONTROL_PROTOCOL,
            LAYERS_PROTOCOL,
            JOB_PROTOCOL,
            RING_PROTOCOL,
        }


def test_a_stranger_cannot_give_a_worker_jobs(swarm: LocalSwarm) -> None:
    async def intrude() -> None:
        identity = Identity.generate()
        config = OverlayConfig(seed=identity.seed, listen=(LOOPBACK,), server=False, validators=VALIDATORS)
        async with open_overlay(config) as overlay:
            worker = swarm.workers[0]
            started = worker.found("worker starting")[0]
            record = await worker_record(overlay, worker)
            loaded = record.range_in("loaded", swarm.manifest)
            assert loaded is not None
            now = int(time.time())
            others = [Identity.generate().peer_id for _ in range(2)]
            stages = [StageEntry(peer_id=started["peer"], start=loaded[0], end=loaded[1])]
            if loaded[0]:
                stages.insert(0, StageEntry(peer_id=others[0], start=0, end=loaded[0]))
            if loaded[1] < 30:
                stages.append(StageEntry(peer_id=others[1], start=loaded[1], end=30))
            ticket = JobTicket(
                job_id=os.urandom(16), epoch=0, manifest=swarm.manifest, n_layers=30, stages=tuple(stages),
                dtype="float32", prompt_tokens=4, max_tokens=4, stop_tokens=(), sampling=Sampling(), price=2,
                begun_at=now, issued_at=now, expires_at=now + 60, coordinator=identity.peer_id,
            )  # fmt: skip
            async with await overlay.open_stream(started["peer"], JOB_PROTOCOL, addrs=started["addrs"]) as stream:
                channel = Channel(stream, JOB)
                await channel.send(Open(), sign_ticket(identity, ticket))
                received = await channel.receive()
                assert received is not None
                assert isinstance(received[0], Refused)
                assert received[0].code == "untrusted_coordinator"
                assert identity.peer_id in received[0].remedy
            async with await overlay.open_stream(started["peer"], RING_PROTOCOL, addrs=started["addrs"]) as stream:
                ring = Channel(stream, RING)
                await ring.send(Hello(job_id=ticket.job_id, epoch=0, stage=0))
                received = await ring.receive()
                assert received is not None
                assert isinstance(received[0], Refused)
                assert received[0].code == "unknown_job"

    trio.run(intrude)


def test_an_answer_waits_for_newcomers_in_lost_workers_places_and_goes_on(tmp_path: Path) -> None:
    """A killed worker ends its streams; a stopped one says nothing any more, and ends none."""
    with LocalSwarm(tmp_path) as swarm:
        for _ in range(3):
            swarm.add_worker("440MiB")
        swarm.wait_until_covered()
        undisturbed = "".join(pieces_of(swarm))
        pieces = pieces_of(swarm)
        answer: list[str] = []
        for lost, how in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
            answer += [next(pieces) for _ in range(5)]
            victim = swarm.workers.pop(1)
            victim.process.send_signal(how)
            try:
                wait_until(lambda: not swarm.health()["covered"], "the coordinator to miss the worker")
                refuses_what_is_not_covered(swarm, victim.found("stage ready")[-1]["layers"])
                swarm.add_worker("440MiB", name=f"newcomer{lost}")
                answer.append(next(pieces))
                assert len(swarm.coordinator.found("stage lost")) == lost
            finally:
                victim.process.kill()
        answer += pieces
        assert "".join(answer) == undisturbed
        wait_until(lambda: jobs_at(swarm) == [0, 0, 0], "the stages to free the job")


def refuses_what_is_not_covered(swarm: LocalSwarm, layers: str) -> None:
    client = OpenAI(base_url=f"{swarm.url}/v1", api_key="none", max_retries=0, timeout=240)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model=swarm.model_id, messages=question, temperature=0)  # type: ignore[arg-type]
    assert refused.value.status_code == 503
    assert refused.value.code == "model_not_covered"
    assert layers in str(refused.value)


def test_a_worker_that_leaves_hands_its_answer_over_first(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path) as swarm:
        for _ in range(2):
            swarm.add_worker("1500MiB")
        swarm.wait_until_covered()
        assert {worker.wait_for("stage ready")["layers"] for worker in swarm.workers} == {"0-29"}
        undisturbed = "".join(pieces_of(swarm, 100))
        pieces = pieces_of(swarm, 100)
        answer = [next(pieces) for _ in range(5)]
        leaver, other = sorted(
            swarm.workers,
            key=lambda worker: fetch_status(tmp_path / worker.name)["jobs"]["running"],
            reverse=True,
        )
        assert leaver.stop() == 0
        assert fetch_status(tmp_path / other.name)["jobs"]["running"] == 1
        answer += pieces
        assert "".join(answer) == undisturbed
        assert len(swarm.coordinator.found("job amended")) == 1
        assert not swarm.coordinator.found("stage lost")
        leave = Program("leave", ["azu-node", "leave", "--data-dir", str(tmp_path / other.name)])
        assert leave.wait() == 0, leave.describe()
        assert other.wait() == 0


def pieces_of(swarm: LocalSwarm, tokens: int = 40) -> Iterator[str]:
    """The texts of an answer of so many tokens, as they come."""
    client = OpenAI(base_url=f"{swarm.url}/v1", api_key="none", max_retries=0, timeout=240)
    stream = client.chat.completions.create(
        model=swarm.model_id,
        messages=[{"role": "user", "content": "Tell me a long story about a lighthouse."}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def test_every_program_ends_cleanly_and_keeps_its_identity(tmp_path: Path) -> None:
    with LocalSwarm(tmp_path) as swarm:
        worker = swarm.add_worker("1500MiB")
        swarm.wait_until_covered()
        peer_id = worker.found("worker starting")[0]["peer"]
        for name in ("bootstrap", "coordinator", "worker1"):
            assert stat.S_IMODE((tmp_path / name / "identity.key").stat().st_mode) == 0o600
        taken = swarm.start("worker1", "azu-node", "join", swarm.multiaddr)
        assert taken.wait() == 2
        assert "another process is using the data folder" in taken.describe()

        stream = start_story(swarm)
        ends: list[BaseException] = []

        def read() -> None:
            try:
                for _ in stream:
                    pass
            except openai.APIError as error:
                ends.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert swarm.coordinator.stop() == 0
        reader.join(60)
        assert ends, "the running answer has to end with an error, not look complete"
        assert "Traceback" not in swarm.coordinator.describe()
        assert worker.stop() == 0
        again = swarm.start("worker1", "azu-node", "join", swarm.multiaddr, "--vram", "1500MiB")
        assert again.wait_for("worker starting")["peer"] == peer_id
        again.process.send_signal(signal.SIGINT)
        assert again.wait() == 130


def test_a_node_waits_for_its_bootstrap_node_and_says_so(tmp_path: Path) -> None:
    boot = Program("boot", ["azu-bootstrap", "run", "--listen", LOOPBACK, "--data-dir", str(tmp_path / "boot")])
    address = str(boot.wait_for("bootstrap node ready")["addrs"][0])
    assert boot.stop() == 0
    options = ["--listen", LOOPBACK, "--data-dir", str(tmp_path / "node"), "--device", "cpu"]
    node = Program("node", ["azu-node", "join", address, *options])
    try:
        said = node.wait_for("cannot join yet")
        assert "refused" in said["reason"]
        assert said["retry_in_s"] > 0
        listen = address.partition("/p2p/")[0]
        boot = Program("boot", ["azu-bootstrap", "run", "--listen", listen, "--data-dir", str(tmp_path / "boot")])
        assert boot.wait_for("bootstrap node ready")["addrs"][0] == address
        node.wait_for("joined the swarm")
        idle = "idle: no coordinator was found in this swarm; waiting for one"
        node.wait_for(idle)
    finally:
        assert node.stop() == 0
        boot.stop()


def test_a_worker_with_too_little_memory_for_one_layer_is_told(swarm: LocalSwarm) -> None:
    worker = Program(
        "small",
        ["azu-node", "join", swarm.multiaddr, "--vram", "20MiB", "--device", "cpu", "--listen", LOOPBACK,
         "--data-dir", str(swarm.folder / "small")],
    )  # fmt: skip
    try:
        wait_until(lambda: any("20.0 MiB are too little" in str(e.get("event")) for e in worker.events), "the reason")
        line = next(str(e["event"]) for e in worker.events if "too little" in str(e.get("event")))
        assert swarm.model_id in line
        assert "--vram" in line
    finally:
        assert worker.stop() == 0


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-17"}, 404, "model_not_found"),
        ({"messages": []}, 400, None),
        ({"messages": [{"role": "user"}]}, 400, None),
        ({"messages": "hello"}, 400, None),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded"),
        ({"max_tokens": 0}, 400, None),
        ({"max_tokens": 1_000_000}, 400, "context_length_exceeded"),
    ],
)
def test_bad_requests_get_openais_errors(
    swarm: LocalSwarm, change: dict[str, object], status: int, code: str | None
) -> None:
    request = {"model": swarm.model_id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | change
    answer = httpx.post(f"{swarm.url}/v1/chat/completions", json=request, timeout=240)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["azu-node", "join"], "azu-bootstrap run"),
        (["azu-node", "join", "127.0.0.1:4001"], "/ip4/"),
        (["azu-node", "join", "/ip4/127.0.0.1/tcp/4001"], "/p2p/"),
        ([*SERVE, "--model", "x"], "azu-coordinator serve --help"),
        ([*SERVE, "--bootstrap", NOBODY], "PAYMENT_PROVIDER=none"),
        (
            [*SERVE, "--bootstrap", NOBODY, "--auth-mode", "open", "--host", "0.0.0.0"],
            "AUTH_MODE=keys",
        ),
    ],
)
def test_bad_command_lines_name_the_remedy(command: list[str], remedy: str, tmp_path: Path) -> None:
    program = Program("program", [*command, "--data-dir", str(tmp_path)])
    assert program.wait() == 2
    assert remedy in program.describe()
    assert "Traceback" not in program.describe()


def test_a_taken_port_is_an_error_with_a_remedy(swarm: LocalSwarm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = Program(
            "second",
            ["azu-coordinator", "serve", "--bootstrap", swarm.multiaddr, "--model", str(swarm.folder / "nothing"),
             "--data-dir", str(swarm.folder / "second"), "--port", str(port), "--listen", LOOPBACK,
             "--payment-provider", "none"],
        )  # fmt: skip
        assert program.wait() in (1, 2)
        assert "nothing" in program.describe()
        assert "Traceback" not in program.describe()
