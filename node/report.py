"""What a worker tells its owner over a loopback port: its metrics, and the document that `azu-node status` shows."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from azu.durable import write_file
from azu.logs import log
from azu.metrics import Metric, Reporter, resident_bytes, serve_metrics
from azu.models.memory import MAX_JOBS
from azu.overlay import Overlay
from node.instruments import Spell, Sums
from node.status import ADDRESS_FILE
from node.worker import AGENT, Worker

__all__ = ["WorkerReport", "serve_report"]

logger = logging.getLogger(__name__)

# Counters out of `Sums`: name, help, value.
_COUNTERS: tuple[tuple[str, str, Callable[[Sums], float]], ...] = (
    ("passes_total", "Forward passes of the device thread.", lambda sums: sums.passes),
    ("pass_steps_total", "Jobs' steps in them.", lambda sums: sums.steps),
    ("pass_rows_total", "Positions in them.", lambda sums: sums.rows),
    ("pass_token_layers_total", "Positions times layers.", lambda sums: sums.token_layers),
    ("pass_compute_seconds_total", "In passes, with the copy to main memory.", lambda sums: sums.compute_s),
    ("pass_wait_seconds_total", "That steps waited for their pass, summed.", lambda sums: sums.waited_s),
    ("ring_messages_total", "Messages sent to next stages.", lambda sums: sums.messages),
    ("ring_sent_bytes_total", "Hidden states sent.", lambda sums: sums.sent_bytes),
    ("ring_serialise_seconds_total", "Making frames of messages.", lambda sums: sums.serialise_s),
    ("ring_credit_seconds_total", "Waiting for room in next stages.", lambda sums: sums.credit_s),
    ("ring_wire_seconds_total", "Until the system took the frames.", lambda sums: sums.wire_s),
    ("ring_inputs_total", "Steps that came in.", lambda sums: sums.inputs),
    ("ring_received_bytes_total", "Hidden states that came in.", lambda sums: sums.received_bytes),
    ("ring_elsewhere_seconds_total", "That jobs waited for their next step to come in.", lambda sums: sums.elsewhere_s),
    ("event_loop_busy_seconds_total", "In turns of the event loop.", lambda sums: sums.loop_busy_s),
)


class WorkerReport(Reporter):
    """One worker's."""

    def __init__(self, worker: Worker, overlay: Overlay) -> None:
        self._worker = worker
        self._overlay = overlay
        self._started_at = time.time()

    def metrics(self) -> Iterable[Metric]:
        """The worker's own, beside what every node has."""
        worker, jobs = self._worker, self._worker.jobs
        minute, start = worker.instruments.last_minute(), worker.instruments.since_start()
        loaded = jobs.loaded
        stage = {f"{loaded.model_id} {loaded.start}-{loaded.end - 1}": 1.0} if loaded else {}
        passes = {"1m": minute.longest_pass_s, "start": start.longest_pass_s}
        stalls = {"1m": minute.longest_stall_s, "start": start.longest_stall_s}
        largest = worker.instruments.passes.statistics().largest
        return [
            Metric("stage", "What is loaded.", "gauge", stage, "layers"),
            Metric("jobs_running", "Jobs in this stage.", "gauge", jobs.count),
            Metric("jobs_admitted_total", "Jobs since the start.", "counter", jobs.admitted),
            Metric("kv_tokens", "Positions of KV cache.", "gauge", jobs.kv.tokens),
            Metric("kv_tokens_reserved", "Of them reserved.", "gauge", jobs.kv.tokens - jobs.kv.free),
            Metric("kv_tokens_filled", "Of those computed.", "gauge", jobs.kv_tokens_filled),
            Metric("history_bytes", "What was sent for running jobs.", "gauge", jobs.history.held),
            Metric("histories_dropped_total", "For lack of memory.", "counter", jobs.history.dropped),
            Metric("layer_files_sent_bytes_total", "Sent to other peers.", "counter", worker.layers.sent_bytes),
            *(Metric(name, text, "counter", value(start.sums)) for name, text, value in _COUNTERS),
            Metric("pass_largest_steps", "Steps in the fullest pass.", "gauge", largest),
            Metric("pass_longest_seconds", "The longest pass.", "gauge", passes, "window"),
            Metric("event_loop_longest_stall_seconds", "Its longest turn.", "gauge", stalls, "window"),
        ]

    def status(self) -> Mapping[str, Any]:
        """Sizes in bytes, times in seconds; layers are [start, end)."""
        worker, jobs, overlay = self._worker, self._worker.jobs, self._overlay
        loaded, loading, instruments = jobs.loaded, worker.loading, worker.instruments
        return {
            "peer_id": overlay.peer_id,
            "agent": AGENT,
            "pid": os.getpid(),
            "uptime_s": time.time() - self._started_at,
            "leaving": jobs.is_leaving,
            "resident_bytes": resident_bytes(),
            "addrs": list(overlay.addrs),
            "reach": str(overlay.finding),
            "connections": overlay.statistics().connections,
            "device": worker.device.label,
            "dtype": worker.dtype,
            "offered_bytes": worker.device.vram,
            "loaded": loaded
            and {
                "manifest": loaded.manifest,
                "model_id": loaded.model_id,
                "layers": [loaded.start, loaded.end],
                "layer_us": loaded.layer_us,
                "speed": loaded.pace.speed().model_dump(),
            },
            "waiting": instruments.waiting,
            "links": [link.model_dump() for link in instruments.ring.links.told(trio.current_time())],
            "loading": loading
            and {
                "manifest": loading.manifest,
                "layers": [loading.start, loading.end],
                "percent": loading.percent,
            },
            "jobs": {"running": jobs.count, "most": MAX_JOBS, "admitted": jobs.admitted},
            "kv_tokens": {
                "all": jobs.kv.tokens,
                "reserved": jobs.kv.tokens - jobs.kv.free,
                "filled": jobs.kv_tokens_filled,
            },
            "layer_files_sent_bytes": worker.layers.sent_bytes,
            "largest_pass_steps": instruments.passes.statistics().largest,
            "last_minute": _spell(instruments.last_minute()),
            "since_start": _spell(instruments.since_start()),
        }


def _spell(spell: Spell) -> dict[str, float]:
    sums = asdict(spell.sums)
    return {
        "seconds": sums.pop("at"),
        **sums,
        "longest_pass_s": spell.longest_pass_s,
        "longest_stall_s": spell.longest_stall_s,
    }


async def serve_report(
    worker: Worker,
    overlay: Overlay,
    address: str,
    data_dir: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at `address` until cancelled, and say in the data folder where that is.

    Raises:
        InputError: the port is taken, or the address is none of this machine's.
    """
    host, _, port = address.rpartition(":")
    report = WorkerReport(worker, overlay)
    place = data_dir / ADDRESS_FILE
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_metrics, overlay, (host.strip("[]"), int(port)), AGENT, report)
        content = json.dumps({"url": url, "peer_id": overlay.peer_id}).encode()
        try:
            await trio.to_thread.run_sync(_note, place, content)
            task_status.started()
            await trio.sleep_forever()
        finally:
            place.unlink(missing_ok=True)


def _note(place: Path, content: bytes) -> None:
    try:
        write_file(place, content)
    except OSError as error:  # a full disk: the metrics answer all the same
        log(logger, logging.WARNING, "azu-node status will not find this worker", reason=str(error))
