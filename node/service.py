"""`azu-node join`: one worker process, from settings to a clean end."""

from __future__ import annotations

import logging
from functools import partial

import trio

from azu.config import NodeSettings
from azu.datadir import open_data_dir
from azu.distribution import LayerServer, Library
from azu.errors import InputError
from azu.joining import overlay_config, stay_joined
from azu.logs import log
from azu.overlay import RelayLimits, open_overlay
from azu.peerbook import PeerBook
from azu.sizes import format_size
from node.book import Book
from node.engine.device import open_device_thread
from node.engine.hardware import find_device, require_packages
from node.engine.openmp import usable_cpus
from node.engine.sharing import turns_on
from node.report import serve_report
from node.trust import Trust
from node.worker import AGENT, Worker

__all__ = ["serve"]

logger = logging.getLogger(__name__)


async def serve(settings: NodeSettings, leave: trio.Event) -> None:
    """Join the swarm and serve until `leave` is set and the jobs have ended here, or until cancelled.

    Raises:
        InputError: a setting that cannot work, such as a missing bootstrap address or device, or a missing package.
    """
    book = PeerBook(settings.data_dir / "peers.json")
    if not settings.bootstrap and not book:
        raise InputError(
            "no bootstrap address was given",
            code="no_bootstrap",
            remedy="Run: azu-node join MULTIADDR, with an address that `azu-bootstrap run` or another node prints",
        )
    threads = settings.threads or usable_cpus()
    device = find_device(settings.device, settings.vram, threads)
    dtype = device.native_dtype if settings.dtype == "auto" else settings.dtype
    require_packages(dtype, device)  # now, and not at the first stage
    _check_cache(settings.cache_limit, device.vram)
    with open_data_dir(settings.data_dir) as identity:
        library = Library(settings.data_dir, cache_limit=settings.cache_limit)
        config = overlay_config(settings, identity, AGENT, relay=RelayLimits() if settings.relay else None)
        turn = turns_on(device.torch_name, threads)
        async with open_overlay(config) as overlay, open_device_thread(turn) as thread, trio.open_nursery() as nursery:
            log(
                logger,
                logging.INFO,
                "worker starting",
                peer=identity.peer_id,
                addrs=overlay.addrs,
                device=device.label,
                vram=format_size(device.vram),
                dtype=dtype,
            )
            worker = Worker(
                identity,
                overlay,
                thread,
                device,
                library,
                LayerServer(library, slots=settings.uploads, rate=settings.upload_limit),
                dtype=dtype,
                trust=Trust(settings.trust),
                payout_address=settings.payout_address or "",
                use_hub=not settings.no_hub,
                failover_memory=settings.failover_memory,
                book=Book(
                    settings.data_dir, keep_bytes=settings.receipts_limit, keep_s=settings.receipts_days * 86_400
                ),
            )
            await nursery.start(serve_report, worker, overlay, settings.metrics, settings.data_dir)
            nursery.start_soon(partial(stay_joined, overlay, settings.bootstrap, book=book))
            nursery.start_soon(worker.run)
            await leave.wait()
            await worker.leave(settings.leave_patience)
            nursery.cancel_scope.cancel()


def _check_cache(limit: int | None, vram: int) -> None:
    if limit is not None and limit < vram:
        log(
            logger,
            logging.WARNING,
            "the layer files of a stage that fills the memory will not fit the cache, and it will not be loaded",
            cache_limit=format_size(limit),
            vram=format_size(vram),
            remedy="Raise --cache-limit above --vram, or offer less memory with --vram",
        )
