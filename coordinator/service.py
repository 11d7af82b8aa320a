"""`azu-coordinator serve`: one coordinator process, from settings to a clean end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import trio

from azu.config import CoordinatorSettings
from azu.datadir import open_data_dir
from azu.distribution import Library, serve_layers
from azu.economics import LAMPORTS_PER_TOKEN_LAYER
from azu.errors import AzuError, InputError, NetworkError
from azu.identity import Identity
from azu.joining import stay_joined
from azu.logs import log
from azu.models.manifest import Manifest
from azu.models.publish import publish
from azu.overlay import Overlay, OverlayConfig, open_overlay
from azu.records import (
    COORDINATORS_KEY,
    VALIDATORS,
    CoordinatorRecord,
    ModelOffer,
    WorkerRecord,
    coordinator_key,
    sign_coordinator_record,
)
from azu.wire.messages import LAYERS_PROTOCOL
from coordinator.api import ApiSettings, create_app, serve_http
from coordinator.generation import Generation, GenerationRequest, ModelHealth, ServedModel
from coordinator.jobs import JobRunner
from coordinator.meter import Meter
from coordinator.placement import Placer, missing_layers, shape_of
from coordinator.swarm import SwarmView

__all__ = ["Service", "serve"]

logger = logging.getLogger(__name__)

AGENT = "azu-coordinator/0.1.0"
_REFRESH_S = 20.0
_RECORD_LIFE_S = 90
_PROVIDE_S = 600.0


class Service:
    """What the HTTP side sees; implements `coordinator.generation.GenerationService`."""

    def __init__(self, models: Iterable[ServedModel], swarm: SwarmView, runner: JobRunner) -> None:
        self._models = tuple(models)
        self._swarm = swarm
        self._runner = runner

    def models(self) -> Sequence[ServedModel]:
        """The published models."""
        return self._models

    def health(self) -> Sequence[ModelHealth]:
        """How well the swarm covers each model right now."""
        workers = self._swarm.workers()
        return [_health(model, missing_layers(model.manifest, workers), workers) for model in self._models]

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        """Start a job; see `GenerationService.generate`."""
        return self._runner.generate(request)


async def serve(settings: CoordinatorSettings) -> None:
    """Publish the models, plan for them and answer HTTP until cancelled.

    Raises:
        InputError: a setting that cannot work. ModelError: a model cannot be published.
    """
    if not settings.models or not settings.bootstrap:
        missing = "--model PATH_OR_HUB_ID" if settings.bootstrap else "--bootstrap MULTIADDR"
        raise InputError(f"{missing} is missing", code="missing_option", remedy="See azu-coordinator serve --help")
    with open_data_dir(settings.data_dir) as identity:
        library = Library(settings.data_dir)
        models = [await _publish(identity, library, source) for source in settings.models]
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set_when_cancelled, stop)
            # From here on a cancel means: let the running answers end first.
            with trio.CancelScope(shield=True):
                await _serve(settings, identity, library, models, stop)
            nursery.cancel_scope.cancel()


async def _set_when_cancelled(stop: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


async def _serve(
    settings: CoordinatorSettings,
    identity: Identity,
    library: Library,
    models: Sequence[ServedModel],
    stop: trio.Event,
) -> None:
    """Everything that needs the network, until `stop` is set and the running answers have ended."""
    config = OverlayConfig(seed=identity.seed, listen=settings.listen, agent=AGENT, validators=VALIDATORS)
    async with open_overlay(config) as overlay, trio.open_nursery() as nursery:
        log(logger, logging.INFO, "coordinator starting", peer=identity.peer_id, addrs=overlay.addrs)
        overlay.handle(LAYERS_PROTOCOL, partial(serve_layers, library))
        swarm = SwarmView(overlay)
        meter = Meter(settings.data_dir / "meter.sqlite")
        runner = JobRunner(identity, overlay, swarm, meter, price=LAMPORTS_PER_TOKEN_LAYER)
        manifests = [model.manifest for model in models]
        nursery.start_soon(stay_joined, overlay, settings.bootstrap)
        nursery.start_soon(swarm.run)
        nursery.start_soon(Placer(identity, swarm, manifests, kv_tokens=settings.kv_tokens).run)
        offers = [_offer(manifest, settings.kv_tokens) for manifest in manifests]
        nursery.start_soon(_advertise, identity, overlay, offers)
        service = Service(models, swarm, runner)
        app = create_app(service, ApiSettings(default_max_tokens=settings.default_max_tokens))
        async with trio.open_nursery() as serving:
            url = await serving.start(partial(serve_http, app, settings.host, settings.port, stop=stop))
            log(logger, logging.INFO, "answering OpenAI clients", url=f"{url}/v1", models=[m.model_id for m in models])
        nursery.cancel_scope.cancel()


async def _publish(identity: Identity, library: Library, source: str) -> ServedModel:
    """Cut a model into layer files, sign its manifest, and make it servable."""
    log(logger, logging.INFO, "publishing model", source=source)
    started = time.monotonic()
    manifest = await trio.to_thread.run_sync(partial(publish, source, library.store))
    library.publish(identity, manifest)
    seconds = round(time.monotonic() - started, 1)
    log(logger, logging.INFO, "model published", model=manifest.model_id, manifest=manifest.digest,
        layers=manifest.n_layers, seconds=seconds)  # fmt: skip
    return ServedModel(
        manifest=manifest,
        tokenizer_files={name: library.store.path(blob.digest) for name, blob in manifest.tokenizer.items()},
        config=json.loads(library.store.path(manifest.config.digest).read_bytes()),
        created=int(time.time()),
    )


async def _advertise(identity: Identity, overlay: Overlay, offers: Sequence[ModelOffer]) -> None:
    """Keep this coordinator and its models findable in the DHT."""
    keys = [COORDINATORS_KEY, *(bytes.fromhex(offer.manifest) for offer in offers)]
    provided = -_PROVIDE_S
    sequence = 0
    while True:
        now = time.time()
        sequence = max(sequence + 1, int(now * 1000))  # grows also where the clock is set back
        record = CoordinatorRecord(
            peer_id=identity.peer_id,
            sequence=sequence,
            issued_at=int(now),
            expires_at=int(now) + _RECORD_LIFE_S,
            agent=AGENT,
            protocols=(LAYERS_PROTOCOL,),
            addrs=overlay.addrs[:16],
            models=tuple(offers),
        )
        try:
            await overlay.put_record(coordinator_key(identity.peer_id), sign_coordinator_record(identity, record))
            if trio.current_time() >= provided + _PROVIDE_S:
                for key in keys:
                    await overlay.provide(key)
                provided = trio.current_time()
        except AzuError as error:
            level = logging.DEBUG if isinstance(error, NetworkError) else logging.WARNING
            log(logger, level, "record not published", reason=str(error))
            await trio.sleep(1)
            continue
        await trio.sleep(_REFRESH_S)


def _offer(manifest: Manifest, kv_tokens: int) -> ModelOffer:
    def least(dtype: str) -> int:
        shape = shape_of(manifest, dtype, kv_tokens)
        return min(shape.stage_bytes(layer, layer + 1) for layer in range(manifest.n_layers))

    return ModelOffer(
        model_id=manifest.model_id,
        manifest=manifest.digest,
        n_layers=manifest.n_layers,
        least_bytes_32=least("float32"),
        least_bytes_16=least("bfloat16"),
    )


def _health(model: ServedModel, missing: tuple[tuple[int, int], ...], workers: Sequence[WorkerRecord]) -> ModelHealth:
    loaded = sum(worker.range_in("loaded", model.manifest.digest) is not None for worker in workers)
    return ModelHealth(model.model_id, not missing, missing, loaded)
